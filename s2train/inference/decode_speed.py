"""Times a model's prefill and decoding, and measures its cache.

The model has random weights and is composed as for training: overrides such as +model=7b_hybrid. Tokens are random.
Runs one process. A step is timed eagerly and, on a GPU, replayed from a CUDA graph; both wait for the device only after
the last token. The prefill's seconds are those of the last run, with all kernels compiled. For comparison, the forward
pass of training is timed without a cache over the same whole prompts, one by one. A batch of `most` is the largest
whose cache fits.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.command_line.program import run_command, settings_before_options
from s2train.config import ParallelConfig, PretrainConfig
from s2train.costs.memory import GIB
from s2train.costs.parameters import total_parameters
from s2train.costs.rank_share import element_bytes
from s2train.environment.hardware import Hardware, detect_own
from s2train.environment.provenance import timed_on
from s2train.errors import ConfigError
from s2train.files import new_file, write_json
from s2train.inference.cached_model import CachedModel, hidden_states
from s2train.inference.kv_cache import kv_cache
from s2train.inference.page_pool import OutOfPagesError
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import compose_run, hybrid_layout
from s2train.validation.attention_kinds import require_feature

Record = dict[str, Any]
_WARM_STEPS = 3  # the first runs eagerly, the second is captured
_WORKING_BYTES = 2 << 30  # tensors of a step, memory of the graph, and memory that torch can't release


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns 1 if a cache's bytes differ from the prediction.
    """
    parser = argparse.ArgumentParser(prog="python -m s2train.inference.decode_speed", description=__doc__)
    parser.add_argument("overrides", nargs="*", default=["+model=7b_hybrid"], help="overrides of launch/pretrain.py")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768, 131072], help="prompt tokens")
    parser.add_argument("--batches", nargs="+", type=_batch, default=[1, 8], help="sequences, or most")
    parser.add_argument("--tokens", type=int, default=64, help="timed steps")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a prefill chunk")
    parser.add_argument(
        "--no-prefill", action="store_true", help="decode over random keys and values instead of slow prompts"
    )
    parser.add_argument("--output", type=new_file, default=None, help="JSON file to write")
    args = parser.parse_args(settings_before_options(sys.argv[1:] if arguments is None else arguments))
    if min(*args.lengths, *(batch or 1 for batch in args.batches), args.tokens - 1, args.chunk) < 1:
        parser.error("lengths, batches and chunk must be at least 1, tokens 2")
    pretrain, hybrid = compose_on_one_device(args.overrides, Feature.DECODING)
    device = initialize(pretrain.parallel, pretrain.seed)
    config = transformer_config(pretrain)
    (chunk,) = build_model(pretrain, config, hybrid, backend_of(pretrain), device)
    gpt = unwrap(chunk).eval()
    console, table = Console(width=160), Table(title=f"{pretrain.model.name}, random weights")
    for name in (
        "prompt",
        "batch",
        "prefill s",
        "tokens/s",
        "forward s",
        "ms/step",
        "with graph",
        "KV MB",
        "MB read",
        "predicted",
        "dense",
    ):
        table.add_column(name, justify="right")
    records: list[Record] = []
    data = {
        **timed_on("inference.decode_speed", arguments, device),
        "model": pretrain.model.name,
        "layers": "".join(layer.kind.letter for layer in hybrid.layers),
        "cases": records,
    }
    for length in args.lengths:
        for batch in args.batches:
            count = batch or max_sequences(gpt, length + args.tokens + _WARM_STEPS, device)
            records.append(measure(gpt, length, count, args.tokens, None if args.no_prefill else args.chunk, device))
            table.add_row(*_row(records[-1]))
            console.print(records[-1])
            if args.output is not None:
                write_json(args.output, data)
    console.print(table)
    shutdown()
    return int(any(record.get("kv_bytes") != record.get("predicted_bytes") for record in records))


def compose_on_one_device(overrides: Sequence[str], feature: Feature) -> tuple[PretrainConfig, HybridLayout]:
    """Compose a model to time on this device alone.

    Raises:
        ConfigError: its kinds of attention lack the feature, or its weights exceed the memory.
    """
    cfg = compose_run(overrides)
    cfg.parallel = ParallelConfig()
    cfg.train.recompute = "none"
    hybrid = hybrid_layout(cfg)
    require_feature(hybrid, feature, "layout.layers", cfg.layout.layers, "Measure another model")
    check_weights(cfg, hybrid, detect_own())
    return cfg, hybrid


def check_weights(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Raise ConfigError if the model's weights alone exceed the device's memory."""
    nbytes = total_parameters(cfg.model, hybrid.layers) * element_bytes(cfg)
    if nbytes > hardware.memory:
        has = f"its weights take {nbytes / GIB:.1f} GiB, and {hardware.name} has {hardware.memory / GIB:.1f}"
        raise ConfigError("model.name", cfg.model.name, has, "Name a smaller model, such as +model=tiny_hybrid")


def _batch(text: str) -> int | None:
    return None if text == "most" else int(text)


def max_sequences(gpt: GPTModel, length: int, device: torch.device) -> int:
    """Largest number of sequences that fit on the device.

    They have `length` tokens. 1 on a CPU.
    """
    if device.type != "cuda":
        return 1
    with kv_cache(gpt, 1, length) as cache:
        sequence = 2 * cache.pool.keys.nbytes
    del cache
    torch.cuda.empty_cache()
    return max(1, (torch.cuda.mem_get_info(device)[0] - _WORKING_BYTES) // sequence)


def measure(gpt: GPTModel, length: int, batch: int, tokens: int, chunk: int | None, device: torch.device) -> Record:
    """Measure one prompt of `length` tokens and `tokens` steps.

    If memory runs out, the record holds "error".

    Args:
        chunk: tokens of a prefill chunk; None decodes over random keys and values instead of a prompt's.
    """
    record: Record = {"length": length, "batch": batch, "chunk": chunk}
    try:
        for cuda_graph in (False, True) if device.type == "cuda" else (False,):
            with kv_cache(gpt, batch, length + tokens + _WARM_STEPS) as cache:
                model = CachedModel(gpt, cache, cuda_graph)
                prompt = torch.randint(0, gpt.vocab_size, (batch, length), device=device)
                _reset_peak(device)
                began = now()
                if chunk is None:
                    cache.fill(np.full(batch, length))
                else:
                    model.prefill(prompt, chunk=chunk)
                    record["prefill_s"] = now() - began
                    record |= _peak("prefill", device)
                for _ in range(_WARM_STEPS):
                    model.decode(prompt[:, -1])
                began = now()
                for _ in range(tokens - 1):  # the last token needs no further step
                    model.decode(prompt[:, -1])
                record["graph_ms" if cuda_graph else "step_ms"] = 1e3 * (now() - began) / (tokens - 1)
                record |= _peak("decode", device)
                record |= {"kv_bytes": cache.bytes_in_use, "predicted_bytes": cache.predicted_bytes()}
                record |= {"state_bytes": cache.state_bytes, "read_bytes": cache.bytes_read()}
                record |= {"dense_bytes": cache.dense_bytes(), "pool_bytes": 2 * cache.pool.keys.nbytes}
            del cache, model  # frees the memory for the next pass
        if chunk is not None:
            torch.cuda.empty_cache()
            record["forward_s"] = forward_seconds(gpt, prompt)
    except (torch.OutOfMemoryError, OutOfPagesError):
        record["error"] = "out of memory"
    torch.cuda.empty_cache()
    return record


@torch.no_grad()
def forward_seconds(gpt: GPTModel, prompts: Tensor) -> float:
    """Time the forward pass of training without a cache.

    The pass is compiled, and takes prompts [b, s] one by one. It ends at the last layer, since a prefill computes the
    logits of one token only, at negligible cost.
    """
    size = prompts.shape[1]
    angles, positions = gpt.rotary_pos_emb(size), torch.arange(size, device=prompts.device)[None]
    hidden_states(gpt, prompts[:1], positions, angles)  # compiles
    began = now()
    for prompt in prompts[:, None]:
        hidden_states(gpt, prompt, positions, angles)
    return now() - began


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(part: str, device: torch.device) -> dict[str, int]:
    """Peak bytes of all tensors since the last call.

    Includes weights and pool.
    """
    if device.type != "cuda":
        return {}
    found = {f"{part}_peak_bytes": torch.cuda.max_memory_allocated(device)}
    _reset_peak(device)
    return found


def now() -> float:
    """Return the time in seconds, after synchronizing the device."""
    torch.cuda.synchronize()  # does nothing on a CPU
    return time.perf_counter()


def _row(record: Record) -> list[str]:
    first = [f"{record['length']:,}", str(record["batch"])]
    if "kv_bytes" not in record:
        return [*first, record["error"]]
    seconds, forward = record.get("prefill_s"), record.get("forward_s")
    graph_ms = f"{record['graph_ms']:.2f}" if "graph_ms" in record else record.get("error", "-")
    return [
        *first,
        *((f"{seconds:.3f}", f"{record['length'] * record['batch'] / seconds:,.0f}") if seconds else ("-", "-")),
        f"{forward:.3f}" if forward else "-",
        f"{record['step_ms']:.2f}",
        graph_ms,
        *(f"{record[name] / 1e6:,.1f}" for name in ("kv_bytes", "read_bytes", "predicted_bytes", "dense_bytes")),
    ]


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
