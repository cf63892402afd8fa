"""Check and time the backward with and without long columns split.

Several programs share a split column.

First the cases of `kernels.check` that split columns are compared with the float64 oracle; a wrong result ends the run.
Then each layout's backward is timed with and without, on the same random inputs (bfloat16, batch 1, head dimension
128), and both results are compared. Times are the device's, with the host ahead. Predictions are those of
`kernels/NOTES.md`, in ms of the backward. The JSON is written after each case.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..attention import block_sparse_attention
from ..check.cases import CASES
from ..check.poison import poisoned
from ..check.run import check_case
from ..hyper import HyperSettings
from ..hyper.launches import local_layout
from ..layout import BlockLayout
from ..provenance import origin
from ..relative_error import relative_error
from ..topk_layout import Layout, TopKLayout
from .cases import parse_case
from .program import add_device, add_output, check_device, check_output, machine, write_results
from .run import failures
from .run_time import RunTimeCase
from .timing import Clock, time_passes

Record = dict[str, Any]
_TOLERANCE = 1e-2  # between both ways: bfloat16 results, float32 sums in another order


@dataclass(frozen=True)
class SplitCase:
    """A layout to time.

    `predicted` are ms of the backward without and with columns split.
    """

    length: int
    heads: int
    kv_heads: int
    make: Callable[[int, torch.device], Layout]  # takes the length
    predicted: tuple[float, float]


def _lists(slots: int) -> Callable[[int, torch.device], Layout]:
    """Return a function that makes top-k lists of 32 heads.

    A list holds the query block's own block, the previous and the first; the others are random.
    """

    def make(length: int, device: torch.device) -> Layout:
        case = RunTimeCase(block=128, slots=slots, length=length, heads=32, kv_heads=8)
        return TopKLayout.from_indices(case.indices(device), 128, num_heads=32)

    return make


def _exact_keys(length: int, device: torch.device) -> Layout:
    """Return HyperAttention's layout of exact keys."""
    settings = HyperSettings()
    return local_layout(settings, -(-length // settings.block), length <= settings.shortest, 16, True, device)


def _window_and_sink(length: int, device: torch.device) -> Layout:
    """Return a window of 8 blocks of 128 and the first block."""
    blocks = length // 128

    def keeps(query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key < 8) | (key < 1))

    return BlockLayout.from_rule([keeps], [0] * 32, 128, blocks, blocks, device=device)


def _s2(word: str) -> Callable[[int, torch.device], Layout]:
    return lambda _, device: parse_case(word).layout(device)


SPLIT_CASES = {
    "hyper-131k": SplitCase(131072, 16, 4, _exact_keys, (22.2, 10.0)),
    "hyper-32k": SplitCase(32768, 16, 4, _exact_keys, (5.0, 1.9)),
    "lists-k19-128k-kv8": SplitCase(131072, 32, 8, _lists(19), (45.8, 43.5)),
    "lists-k19-32k-kv8": SplitCase(32768, 32, 8, _lists(19), (8.4, 8.0)),
    "lists-k16-128k-kv8": SplitCase(131072, 32, 8, _lists(16), (41.9, 37.6)),
    "lists-k16-32k-kv8": SplitCase(32768, 32, 8, _lists(16), (8.2, 7.3)),
    "lists-k16-8k-kv8": SplitCase(8192, 32, 8, _lists(16), (1.4, 1.4)),
    "window-sink-128k-kv8": SplitCase(131072, 32, 8, _window_and_sink, (20.6, 13.1)),
    "window-sink-32k-kv8": SplitCase(32768, 32, 8, _window_and_sink, (5.3, 3.3)),
    "b128-l8-v16-32k": SplitCase(32768, 32, 32, _s2("b128-l8-v16-32k"), (4.8, 4.8)),
    "b128-l8-v16-128k": SplitCase(131072, 32, 32, _s2("b128-l8-v16-128k"), (43.9, 43.9)),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 on wrong results or failures."""
    args = _parse(arguments)
    began, device, console = time.monotonic(), torch.device(args.device), Console(width=150)
    torch.manual_seed(args.seed)
    clock = Clock(device)
    data: Record = {
        **origin("kernels.benchmarks.split_columns", arguments),
        "machine": machine(device),
        "seed": args.seed,
    }
    data |= {"backend": args.backend, "checks": [], "cases": []}
    for name in args.checks:
        with failures() as failed, poisoned():
            data["checks"].append({"case": name} | check_case(CASES[name], device))
        if failed:
            data["checks"].append({"case": name, "ok": False, "error": failed[0]})
        write_results(data, args.output)
        console.print(data["checks"][-1])
    if not all(row["ok"] for row in data["checks"]):
        console.print("wrong results: nothing is timed")
        return 1
    for name in args.cases:
        if time.monotonic() - began > args.seconds:
            console.print(f"{name}: not run, out of time")
            continue
        record: Record = {}
        with failures() as failed:
            record = measure(SPLIT_CASES[name], args.backend, clock, device, args.budget_ms)
        data["cases"].append({"case": name} | ({"error": failed[0]} if failed else record))
        data["seconds"] = time.monotonic() - began
        write_results(data, args.output)
        console.print(data["cases"][-1])
    console.print(split_table(data["cases"]))
    return int(any("error" in record for record in data["cases"]))


def measure(case: SplitCase, backend: str, clock: Clock, device: torch.device, budget_ms: float) -> Record:
    """Time forward and backward with and without split columns; compare the results."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, dout = (torch.randn(case.length, 1, n, 128, device=device, dtype=dtype) for n in counts)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layout = case.make(case.length, device)
    record: Record = {"length": case.length, "heads": case.heads, "kv_heads": case.kv_heads, "results": {}}
    gradients = {}
    for name, split in (("whole", False), ("split", True)):

        def forward(split: bool) -> Tensor:
            out: Tensor = block_sparse_attention(q, k, v, layout, backend=backend, split_columns=split)  # type: ignore[call-overload]
            return out

        def backward(out: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, dout)

        attend = partial(forward, split)
        gradients[name] = backward(attend())
        record["results"][name] = time_passes(attend, backward, clock, budget_ms)
    record["differences"] = {
        name: relative_error(a, b.float())
        for name, a, b in zip(("dq", "dk", "dv"), gradients["split"], gradients["whole"], strict=True)
    }
    if not all(x <= _TOLERANCE for x in record["differences"].values()):
        record["error"] = f"the results differ: {record['differences']}"
    whole, split_ms = (record["results"][name]["ms"]["backward"] for name in ("whole", "split"))
    return record | {"predicted": case.predicted, "gain": whole / split_ms}


def split_table(records: list[Record]) -> Table:
    """Tabulate the backward's ms beside the predictions."""
    table = Table("", "whole ms", "predicted", "split ms", "predicted", "gain", title="backward", box=None)
    for record in records:
        if "error" in record:
            table.add_row(record["case"], record["error"])
            continue
        whole, split = (record["results"][name]["ms"]["backward"] for name in ("whole", "split"))
        before, after = record["predicted"]
        table.add_row(
            record["case"], f"{whole:.2f}", f"{before:.1f}", f"{split:.2f}", f"{after:.1f}", f"{whole / split:.2f}"
        )
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.split_columns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    checks = [name for name, case in CASES.items() if case.split]
    parser.add_argument("--cases", nargs="*", default=list(SPLIT_CASES), choices=list(SPLIT_CASES), metavar="CASE")
    parser.add_argument("--checks", nargs="*", default=checks, choices=checks, metavar="CHECK")
    parser.add_argument("--backend", default="triton", choices=("triton", "portable"))
    add_output(parser, "split-columns")
    parser.add_argument("--seed", type=int, default=torch.seed() % 2**31)
    parser.add_argument("--budget-ms", type=float, default=500, help="device time of a layout's timed passes")
    parser.add_argument("--seconds", type=float, default=300, help="start nothing new after this time")
    add_device(parser)
    args = parser.parse_args(arguments)
    check_output(parser, args)
    check_device(parser, args, "in Triton's interpreter")
    return args


if __name__ == "__main__":
    sys.exit(main())
