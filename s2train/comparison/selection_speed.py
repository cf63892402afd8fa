"""Times attention to selected blocks, its selection phases, and dense attention.

One layer's core attention, as in training: random queries, keys and values, bfloat16 on a GPU, batch 1, forward and
backward. `attention` is the sparse op alone with lists made before; `whole` is the core attention with scorer,
selection, lists, losses and their gradients. The phases are forward passes alone: pooled queries, pooled keys, scores
and selection, and the lists that the kernels read. `target` is the true probability of sampled queries. Dense
attention: FlashAttention-4 where it is installed, and torch's cuDNN. `fla` is the MoBA of flash-linear-attention with
the same number of blocks, where that and flash-attn are installed. Device times with the host ahead; the JSON is
written after each case.

Run it on one GPU: python -m s2train.comparison.selection_speed --output FILE.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from s2train.attention.block_selection import SCORERS
from s2train.attention.selection.targets import row_mass, sampled_positions
from s2train.comparison.fla_moba import fla_moba, fla_problem
from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PretrainConfig, TrainConfig
from s2train.environment.dtypes import DTYPES
from s2train.environment.provenance import timed_on
from s2train.files import new_file, write_json
from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.benchmarks.timing import Clock, time_passes
from s2train.kernels.dense import dense_causal_attention
from s2train.kernels.flash4 import fa4_problem
from s2train.kernels.topk_layout import TopKLayout
from s2train.megatron.block_selection import BlockSelectionCoreAttention
from s2train.megatron.layer_backends import choose_backend
from s2train.megatron.model import build_model, transformer_config
from s2train.megatron.selection_cache import pooled_keys
from s2train.megatron.setup import initialize, shutdown
from s2train.planning import hybrid_layout

Record = dict[str, Any]
MOST_ON_CPU = 4096  # tokens
BESIDE = 3  # blocks kept beside the selected ones: two of the window and a sink
PHASES = ("pool queries", "pool keys", "scores and selection", "lists")  # before attention


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m s2train.comparison.selection_speed", description=__doc__)
    parser.add_argument("--lengths", nargs="+", type=int, default=[32768, 131072], help="tokens")
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=["moba", "index", "sea"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128, help="of a head")
    parser.add_argument("--block", type=int, default=128, help="tokens")
    parser.add_argument("--top-k", type=int, default=16, help=f"blocks, with {BESIDE} beside them")
    parser.add_argument("--budget-ms", type=float, default=300, help="of device time for each measurement")
    parser.add_argument("--output", type=new_file, default=None, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available() and max(args.lengths) > MOST_ON_CPU:
        parser.error(f"needs a GPU for lengths above {MOST_ON_CPU:,}, which take hours on a CPU: set shorter --lengths")
    device = initialize(ParallelConfig(), 1)
    clock = Clock(device)
    cases: list[Record] = []
    data: Record = {
        **timed_on("comparison.selection_speed", arguments, device, ("flash-linear-attention",)),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "cases": cases,
    }
    for length in args.lengths:
        for name in ("dense", "fla", *args.scorers):
            cases.append({"length": length, "case": name} | _measure(name, length, args, clock, device))
            print(json.dumps(cases[-1]), flush=True)
            if args.output is not None:
                write_json(args.output, data)
    shutdown()
    return int(any("error" in case for case in cases))


def _measure(name: str, length: int, args: argparse.Namespace, clock: Clock, device: torch.device) -> Record:
    try:
        if name == "dense":
            return measure_dense(inputs(length, args, device), clock, args.budget_ms)
        if name == "fla":
            return measure_fla(inputs(length, args, device), args.block, args.top_k + BESIDE, clock, args.budget_ms)
        return measure_scorer(
            build_core(name, length, args, device), inputs(length, args, device), clock, args.budget_ms
        )
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def build_core(scorer: str, length: int, args: argparse.Namespace, device: torch.device) -> BlockSelectionCoreAttention:
    """Build a model of one block-selection layer; return its core attention."""
    selection = {"kind": "block_selection", "scorer": scorer, "top_k": args.top_k}
    cfg = PretrainConfig(
        model=ModelConfig("speed", 1, 256, 256, args.heads, args.kv_heads, head_dim=args.dim, vocab_size=64),
        layout=LayoutConfig("B", args.block, kinds={"B": selection}),
        parallel=ParallelConfig(),
        train=TrainConfig(1, length, 1, precision="bf16" if device.type == "cuda" else "fp32"),
    )
    hybrid = hybrid_layout(cfg)
    hybrid.layers[0].kind.check(cfg)
    (model,) = build_model(cfg, transformer_config(cfg), hybrid, choose_backend("local"), device)
    (core,) = (module for module in model.modules() if isinstance(module, BlockSelectionCoreAttention))
    core.step = 1
    return core


def inputs(length: int, args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Draw query, key and value, with gradients."""
    dtype = DTYPES["bf16" if device.type == "cuda" else "fp32"]
    heads = (args.heads, args.kv_heads, args.kv_heads)
    return [torch.randn(length, 1, n, args.dim, dtype=dtype, device=device, requires_grad=True) for n in heads]


def measure_dense(leaves: list[Tensor], clock: Clock, budget_ms: float) -> Record:
    """Time dense causal attention by each implementation that this machine has."""
    record: Record = {}
    scale = leaves[0].shape[-1] ** -0.5
    names = ["cudnn"] if leaves[0].is_cuda else ["auto"]
    if leaves[0].is_cuda:
        if (problem := fa4_problem()) is None:
            names.insert(0, "fa4")
        else:
            record["fa4"] = {"absent": problem}
    for name in names:
        record[name] = _passes(
            partial(dense_causal_attention, *leaves, softmax_scale=scale, implementation=name),
            leaves,
            clock,
            budget_ms,
        )
    return record


def measure_fla(leaves: list[Tensor], block: int, blocks: int, clock: Clock, budget_ms: float) -> Record:
    """Time the MoBA of flash-linear-attention, with its selection."""
    if (problem := fla_problem()) is not None:
        return {"absent": problem}
    query, key, value = leaves
    return {"whole": _passes(lambda: fla_moba(query, key, value, block, blocks), leaves, clock, budget_ms)}


def measure_scorer(core: BlockSelectionCoreAttention, leaves: list[Tensor], clock: Clock, budget_ms: float) -> Record:
    """Time the core attention with one scorer, whole and in parts.

    The parts are the sparse op and each phase before it.
    """
    query, key, value = leaves
    size, length = core.layer_layout.block_size, query.shape[0]
    count = core.layer_layout.num_blocks(length)
    with torch.no_grad():
        block_queries, features = core.block_queries(query), core.features(key)
        indices = core.lists(block_queries, features, 0, features.shape[1])
    layout = core.layout_of(indices, query, 0)
    at = sampled_positions(length, core.kind.settings.sampled_rows, 1, query.device)

    def op(layout: TopKLayout) -> Tensor:
        return block_sparse_attention(query, key, value, layout, softmax_scale=core.softmax_scale)

    def attend_to_lists() -> object:
        return op(core.layout_of(indices, query, 0))

    phases: dict[str, Callable[[], object]] = {
        "pool queries": lambda: core.block_queries(query),
        "pool keys": lambda: pooled_keys(core, key),
        "scores and selection": lambda: core.lists(block_queries, features, 0, features.shape[1]),
        "target": lambda: row_mass(query[at], key, at, size, core.softmax_scale),
    }
    found: Record = {}
    with torch.no_grad():
        found["phases_ms"] = {name: _time(phase, clock, budget_ms / 4) for name, phase in phases.items()}
        prebuilt = _time(lambda: op(layout), clock, budget_ms / 4)
        # the lists of the forward pass
        found["phases_ms"]["lists"] = _time(attend_to_lists, clock, budget_ms / 4) - prebuilt
    found["attention"] = _passes(lambda: op(layout), leaves, clock, budget_ms)
    whole = [*leaves, *core.parameters()]
    found["whole"] = _passes(lambda: core(query, key, value, None).view_as(query), whole, clock, budget_ms)
    core.records.take()
    both = found["whole"]["ms"]["both"]
    found["selection_share"] = sum(found["phases_ms"][name] for name in PHASES) / both
    found["beyond_attention_share"] = 1 - found["attention"]["ms"]["both"] / both
    found["kept_blocks"] = int((indices >= 0).sum()) / (core.num_kv_heads * count)
    return found


def _passes(forward: Callable[[], Tensor], leaves: list[Tensor], clock: Clock, budget_ms: float) -> Record:
    upstream = torch.randn_like(forward())

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, leaves, upstream)

    backward(forward())  # compiles
    return time_passes(forward, backward, clock, budget_ms)


def _time(call: Callable[[], object], clock: Clock, budget_ms: float) -> float:
    """Median ms of a call, warm."""
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 20):
        clock.start()
        before = clock.mark()
        call()
        after = clock.mark()
        clock.wait()
        times.append(clock.milliseconds(before, after))
    return median(times)


if __name__ == "__main__":
    sys.exit(main())
