"""Compare and time variants of the Hopper kernels.

`python -m s2train.kernels.hopper.tune [--backward | --candidates [--only NAME ...]]`: several processes compile all
variants. Then one process compares each with a float32 oracle (the backward with the portable kernels) and takes its
median time. To check a kernel in every feature, use `s2train.kernels.check`.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import spec
from ..backward import backward
from ..benchmarks.program import check_new, write_results
from ..check.poison import nan_filled
from ..forward import forward
from ..layout import BlockLayout
from ..relative_error import largest, relative_error
from ..spec import AttentionSpec, to_bhsd
from ..workers import run_tasks, serve
from .backward import hopper_backward
from .backward_config import HopperBackwardConfig, chosen_config, config_of
from .backward_schedule import PLAIN, ScheduleOptions
from .forward import hopper_forward
from .forward_config import CONFIGS, HopperConfig

_SECONDS = 60.0  # time limit of an item
_VARIANTS: dict[str, HopperConfig | None] = {
    "q2 k2 v3": HopperConfig(2, 2, 3),
    "q2 k3 v2": HopperConfig(2, 3, 2),
    "q1 k3 v3": HopperConfig(1, 3, 3),
    "q2 k2 v2": HopperConfig(2, 2, 2),
    "d 64": CONFIGS[64, 128],
    "portable": None,  # the Triton kernel
}
_BACKWARD_VARIANTS: dict[str, HopperBackwardConfig | None] = {
    **{
        f"d {dim}, st {stages}": HopperBackwardConfig(stages)
        for dim, stages in ((128, 3), (128, 2), (64, 3), (64, 4), (64, 5))
    },
    "portable": None,
}
# Choices for the backward; kernels/NOTES.md says what each brings. The plain settings come first and last, so that a
# drift of the GPU's clock shows; before the last, what a call without explicit settings gets.
_CANDIDATES: dict[str, ScheduleOptions | None] = {
    "plain": PLAIN,
    "128 queries": ScheduleOptions(query_tile=128),
    "second pairs": ScheduleOptions(second_pairs=True),
    "by query head": ScheduleOptions(by_query_head=True),
    "second, by head": ScheduleOptions(second_pairs=True, by_query_head=True),
    "128, by head": ScheduleOptions(query_tile=128, by_query_head=True),
    "chosen": None,
    "plain, again": PLAIN,
}
_EMPTY = spec.empty
_LOCAL = {128: 8, 64: 16}
_STRIDE = 16
_HEADS = 32


@dataclass(frozen=True)
class Item:
    """A variant's time on the local + vertical mask.

    With length 0, only compile it. Tensors are bfloat16, with batch 1 and 32 heads.
    """

    variant: str
    length: int
    block: int
    kv_heads: int = _HEADS
    dim: int = 128
    backward: bool = False
    candidate: bool = False

    @property
    def milliseconds(self) -> int:
        """How long it is timed."""
        return 500 if self.candidate else 120

    @property
    def config(self) -> HopperConfig | None:
        """The forward's; None: the portable kernel."""
        return _VARIANTS[self.variant]

    def backward_config(self, layout: BlockLayout, s_q: int, settings: AttentionSpec) -> HopperBackwardConfig | None:
        """Return the backward's; None: the portable kernels."""
        if not self.candidate:
            return _BACKWARD_VARIANTS[self.variant]
        options = _CANDIDATES[self.variant]
        if options is None:
            return chosen_config(layout, self.dim, self.kv_heads, s_q, settings)
        return config_of(self.dim, options)

    @property
    def problem(self) -> str:
        heads = "" if self.kv_heads == _HEADS else f" {_HEADS}/{self.kv_heads}"
        dim = f" d {self.dim}" if self.dim != 128 else ""
        return f"{self.length // 1024}k B={self.block}{heads}{dim}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.hopper.tune", description=__doc__)
    parser.add_argument("--json", type=Path, help="write each result there at once")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--backward", action="store_true", help="variants of the backward")
    which.add_argument(
        "--candidates", action="store_true", help="the backward's choices beside plain settings, where they apply"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", choices=[*_CANDIDATES],
        help="of the candidates, time these and plain settings, in problems that have them",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only and not args.candidates:
        parser.error("--only takes --candidates")
    if args.worker:
        problems: dict[Any, Problem] = {}
        serve(lambda task: _run_item(Item(**task), problems))
        return 0
    check_new(parser, args.json, "--json")
    started = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    command = ["-m", "s2train.kernels.hopper.tune", "--worker"]
    if args.candidates:
        items = candidate_items(args.lengths, args.only)
    else:
        items = _backward_items(args.lengths) if args.backward else _items(args.lengths)
    compiled = {(i.variant, i.block, i.dim, i.kv_heads): asdict(replace(i, length=0)) for i in items}
    for task, row in zip(
        compiled.values(), run_tasks(command, list(compiled.values()), args.jobs, _SECONDS), strict=True
    ):
        if not row["ok"]:
            print(f"FAIL compile {task['variant']} B={task['block']}: {row.get('error')}", flush=True)
    print(f"{len(compiled)} compiled in {time.monotonic() - started:.0f} s", flush=True)
    timings: list[dict[str, Any]] = []
    for item, row in zip(items, run_tasks(command, [asdict(x) for x in items], 1, _SECONDS), strict=True):
        timings.append({"task": f"{item.problem} {item.variant}", **row})
        if item.candidate:
            timings[-1].update(over_plain(timings))
        print(_timing_line(timings[-1]), flush=True)
        if args.json:  # at once: the run may be killed
            write_results({"timings": timings}, args.json)
    _print_table(timings)
    failed = [row["task"] for row in timings if not row["ok"]]
    print(f"{len(timings)} items, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


def _items(lengths: list[int]) -> list[Item]:
    items = []
    for length in lengths:
        for block in (128, 64):
            items += [Item(variant, length, block) for variant in _VARIANTS if "d 64" not in variant]
            items += [Item(variant, length, block, kv_heads=8) for variant in ("q2 k2 v3", "q1 k3 v3")]
    items += [Item("d 64", lengths[0], b, dim=64) for b in (128, 64)]
    # grouped by problem, so that its tensors are made once
    return sorted(items, key=lambda item: (item.length, item.dim, item.block, item.kv_heads))


def _backward_items(lengths: list[int]) -> list[Item]:
    items = [
        Item(variant, length, block, kv_heads, dim, backward=True)
        for length in lengths
        for dim in (128, 64)
        for block in (128, 64)
        for kv_heads in (_HEADS, 8)
        for variant in _BACKWARD_VARIANTS
        if variant == "portable" or variant.startswith(f"d {dim},")
    ]
    return [i for i in items if i.dim == 128 or i.length == lengths[0]]


def over_plain(timings: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last row's speed over that of plain settings.

    Empty if either was not timed.
    """
    last = timings[-1]
    for row in timings:
        if row.get("variant") == "plain" and row.get("problem") == last.get("problem") and "ms" in row and "ms" in last:
            return {"over_plain": row["ms"] / last["ms"]}
    return {}


def candidate_items(lengths: list[int], only: list[str] | None = None) -> list[Item]:
    """Return candidates and the choice between plain settings, by problem.

    With `only`, return plain settings and these, for problems that have a candidate of them.
    """
    problems = {
        (_HEADS, 64, 128): ["128 queries"],
        (8, 64, 128): ["128 queries", "by query head", "128, by head"],
        (8, 64, 64): ["second pairs", "by query head", "second, by head"],
        (8, 128, 64): ["second pairs", "by query head", "second, by head"],
        (8, 128, 128): ["by query head"],
    }
    return [
        Item(variant, length, block, kv_heads, dim, backward=True, candidate=True)
        for length in lengths
        for (kv_heads, dim, block), variants in problems.items()
        if only is None or not set(only).isdisjoint(variants)
        for variant in ("plain", *variants, "chosen", "plain, again")
        if only is None or variant in ("plain", *only)
    ]


@dataclass(frozen=True)
class Problem:
    """Tensors, layout, patterns, and exact rows of some heads.

    Tensors are views [b, h, s, d].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: BlockLayout
    flops: float
    exact: list[tuple[int, int, int, Tensor, Tensor]]


def _run_item(item: Item, problems: dict[Any, Problem]) -> dict[str, Any]:
    torch.manual_seed(0)
    spec.empty = nan_filled
    # in 4096 tokens and more, key tiles of blocks of 64 have second partners
    length = item.length or (4096 if item.candidate else 512)
    key = (length, item.block, item.kv_heads, item.dim)
    if key not in problems:
        problems.clear()
        torch.cuda.empty_cache()
        problems[key] = _problem(length, item)
    p = problems[key]
    settings = AttentionSpec(1 / math.sqrt(item.dim), True, 0, None, "sbhd")
    if item.backward:
        return _run_backward(item, p, settings)
    config = item.config

    def run() -> tuple[Tensor, Tensor]:
        if config is None:
            return forward(p.q, p.k, p.v, p.layout, settings)
        return hopper_forward(p.q, p.k, p.v, p.layout, settings, config)

    out, lse = run()
    errors, lse_error = [], 0.0
    for head, start, stop, out_rows, lse_rows in p.exact:
        errors.append(relative_error(out[0, head, start:stop], out_rows))
        lse_error = max(lse_error, (lse[0, head, start:stop] - lse_rows).abs().max().item())
    complete = not bool(out.isnan().any() | lse.isnan().any())
    error = largest(errors)
    row: dict[str, Any] = {"problem": item.problem, "variant": item.variant, "error": error, "lse_error": lse_error}
    row["ok"] = complete and error < 6e-3 and lse_error < 2e-3
    if not row["ok"]:
        return row | {"error": f"wrong: out {errors}, lse {lse_error:.1e}, complete {complete}"}
    if item.length:
        spec.empty = _EMPTY
        ms = triton.testing.do_bench(run, warmup=40, rep=item.milliseconds, return_mode="median")
        row |= {"ms": ms, "tflops": p.flops / ms / 1e9}
    return row


def _run_backward(item: Item, p: Problem, settings: AttentionSpec) -> dict[str, Any]:
    config = item.backward_config(p.layout, p.q.shape[2], settings)
    out, lse = forward(p.q, p.k, p.v, p.layout, settings)
    dout = torch.randn_like(out)
    arguments = (p.q, p.k, p.v, out, lse, dout, None, p.layout, settings)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return backward(*arguments) if config is None else hopper_backward(*arguments, config)

    expected = [x.float() for x in backward(*arguments)]
    errors = [relative_error(x, y) for x, y in zip(run(), expected, strict=True)]
    row: dict[str, Any] = {"problem": item.problem, "variant": item.variant, "error": largest(errors)}
    if config is not None:
        row |= {"stages": config.stages} | asdict(config.schedule)
    row["ok"] = all(error < 6e-3 for error in errors)
    if not row["ok"]:
        return row | {"error": f"wrong: dq, dk, dv {errors}"}
    if item.length:
        spec.empty = _EMPTY
        ms = triton.testing.do_bench(run, warmup=40, rep=item.milliseconds, return_mode="median")
        row |= {"ms": ms, "tflops": 2.5 * p.flops / ms / 1e9}
    return row


def _problem(length: int, item: Item) -> Problem:
    q, k, v = (
        to_bhsd(torch.randn(length, 1, heads, item.dim, device="cuda", dtype=torch.bfloat16), "sbhd")
        for heads in (_HEADS, item.kv_heads, item.kv_heads)
    )
    block = torch.arange(length // item.block, device="cuda")
    distance = block[:, None] - block
    vertical = [(block + 1 + head) % _STRIDE == 0 for head in range(_STRIDE)]
    patterns = torch.stack([((distance < _LOCAL[item.block]) | column) & (distance >= 0) for column in vertical])
    layout = BlockLayout.from_patterns(patterns, [h % _STRIDE for h in range(_HEADS)], item.block)
    below = patterns.sum((1, 2)) - len(block)
    kept = below * item.block**2 + len(block) * item.block * (item.block + 1) // 2
    flops = 4.0 * item.dim * float(kept.sum()) * (_HEADS // _STRIDE)
    middle = length // 2 // 128 * 128
    rows = [(3, 0, min(length, 1024)), (17, 0, 256), (5, length - 256, length), (30, middle, middle + 128)]
    exact = [(head, *_exact(q, k, v, patterns, item, head, start, stop)) for head, start, stop in rows]
    return Problem(q, k, v, layout, flops, exact)


def _exact(
    q: Tensor, k: Tensor, v: Tensor, patterns: Tensor, item: Item, head: int, start: int, stop: int
) -> tuple[int, int, Tensor, Tensor]:
    """Compute rows [start, stop) of a head's output and log-sum-exp in float32."""
    kv_head = head // (_HEADS // item.kv_heads)
    scores = q[0, head, start:stop].float() @ k[0, kv_head, :stop].float().T / math.sqrt(item.dim)
    query, key = torch.arange(start, stop, device=q.device), torch.arange(stop, device=q.device)
    keep = patterns[head % _STRIDE][query // item.block][:, key // item.block] & (query[:, None] >= key)
    scores = scores.masked_fill(~keep, -torch.inf)
    return start, stop, torch.softmax(scores, -1) @ v[0, kv_head, :stop].float(), torch.logsumexp(scores, -1)


def _timing_line(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"FAIL {row['task']:<40} {row['error']}"
    ratio = f"  {row['over_plain']:.3f} of plain's speed" if "over_plain" in row else ""
    return f"ok   {row['task']:<40} {row['ms']:.3f} ms {row['tflops']:.0f} TFLOP/s  error {row['error']:.1e}{ratio}"


def _print_table(rows: list[dict[str, Any]]) -> None:
    times = {(row["problem"], row["variant"]): row for row in rows if "ms" in row}
    problems = list(dict.fromkeys(problem for problem, _ in times))
    print(" " * 24 + "".join(f"{problem:>18}" for problem in problems) + "   (ms, TFLOP/s)")
    for variant in dict.fromkeys(variant for _, variant in times):
        rows_of_variant = [times.get((problem, variant)) for problem in problems]
        cells = [f"{row['ms']:.3f} {row['tflops']:.0f}" if row else "" for row in rows_of_variant]
        print(f"{variant:<24}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
