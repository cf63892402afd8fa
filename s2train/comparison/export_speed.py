"""Times the prefill of an export's own file beside our engine's.

Both have the shape of a composed model, such as +model=7b_hybrid, random weights and a cache, and read each prompt at
once. Kernels are compiled before. Times are medians, and end when the device has the last token's logits.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.hugging_face.exporting import llama_config
from s2train.checkpoints.hugging_face.modeling_s2 import S2Config, S2ForCausalLM
from s2train.command_line.program import run_command, settings_before_options
from s2train.config import PretrainConfig
from s2train.data.tokenizers import ByteTokenizer
from s2train.environment.dtypes import DTYPES
from s2train.environment.provenance import timed_on
from s2train.files import new_file, write_json
from s2train.inference.cached_model import CachedModel
from s2train.inference.decode_speed import compose_on_one_device, now
from s2train.inference.kv_cache import kv_cache
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.setup import initialize, shutdown


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m s2train.comparison.export_speed", description=__doc__)
    parser.add_argument("overrides", nargs="*", default=["+model=7b_hybrid"], help="overrides of launch/pretrain.py")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768], help="prompt tokens")
    parser.add_argument("--runs", type=int, default=5, help="timed prefills")
    parser.add_argument("--output", type=new_file, default=None, help="JSON file to write")
    words = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(settings_before_options(words))
    if min(*args.lengths, args.runs) < 1:
        parser.error("lengths and runs must be at least 1")
    cfg, hybrid = compose_on_one_device(args.overrides, Feature.EXPORT)
    device = initialize(cfg.parallel, cfg.seed)
    prompts = [torch.randint(0, cfg.model.vocab_size, (1, length), device=device) for length in args.lengths]
    engine = engine_seconds(cfg, hybrid, prompts, args.runs, device)
    export = export_seconds(cfg, prompts, args.runs, device)
    rows = [
        {"length": length, "engine_s": ours, "export_s": its, "export_over_engine": its / ours}
        for length, ours, its in zip(args.lengths, engine, export, strict=True)
    ]
    table = Table(title=f"prefill of {cfg.model.name}, random weights")
    for name in ("prompt", "engine s", "export s", "export / engine"):
        table.add_column(name, justify="right")
    for row in rows:
        values = (f"{row[name]:.4g}" for name in ("engine_s", "export_s", "export_over_engine"))
        table.add_row(f"{row['length']:,}", *values)
    Console(width=100).print(table)
    if args.output is not None:
        data = {
            **timed_on("comparison.export_speed", words, device),
            "model": cfg.model.name,
            "cases": rows,
        }
        write_json(args.output, data)
    shutdown()
    return 0


def engine_seconds(
    cfg: PretrainConfig, hybrid: HybridLayout, prompts: list[Tensor], runs: int, device: torch.device
) -> list[float]:
    """Time our engine's prefill of prompts [1, s]."""
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid, backend_of(cfg), device)
    gpt = unwrap(chunk).eval()

    def prefill(prompt: Tensor) -> None:
        with kv_cache(gpt, 1, prompt.shape[1]) as cache:
            CachedModel(gpt, cache).prefill(prompt, chunk=prompt.shape[1])

    return [median_seconds(partial(prefill, prompt), runs) for prompt in prompts]


def export_seconds(cfg: PretrainConfig, prompts: list[Tensor], runs: int, device: torch.device) -> list[float]:
    """Time the export's own prefill of prompts [1, s]."""
    config = S2Config(**llama_config(cfg, cfg.model.vocab_size, ByteTokenizer()))
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[cfg.train.precision])
    try:
        with device:
            model = S2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)

    def prefill(prompt: Tensor) -> None:
        model(prompt, use_cache=True, logits_to_keep=1)

    return [median_seconds(partial(prefill, prompt), runs) for prompt in prompts]


@torch.inference_mode()
def median_seconds(run: Callable[[], object], runs: int) -> float:
    """Return the median seconds of `runs` calls, after one that compiles."""
    seconds = []
    for _ in range(runs + 1):
        began = now()
        run()
        seconds.append(now() - began)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    run_command(lambda: sys.exit(main()))
