"""Time the kernels and other implementations of attention.

These are dense cuDNN and FlashAttention-2 (torch SDPA), FlexAttention, and, if installed, FlashAttention-4
(block-sparse and dense), FlashAttention-3 and dkernel. All run in this process on the same random inputs (bfloat16,
batch 1), each in its best format: ours [s, b, h, d] as in Megatron, the others [b, h, s, d]. Each is compared with a
float64 oracle, completely at 2,048 tokens and in samples at full length, and is not timed if it fails. Times are the
device's, with the host ahead. The backward counts 2.5 times the forward's 4 * d FLOPs a position, over the positions
that the contender's own mask keeps. Peak memory is what forward and backward need besides q, k, v and the output's
gradient, including indices.

cases: groups (targets, lengths, density, b64, gqa, gqa64, long, quick) or words such as b128-l8-v16-32k-kv8: blocks of
128, 8 local, every 16th, 32k tokens, 8 KV heads (and -h for heads, -d for their dimension). They run in the given
order; the default starts with the most important. The JSON is written after each, so that an interrupted run loses one
case. The group run-time, or words such as b128-k16-32k-kv8 (16 key blocks per query block, listed on the device in
every step), compare our top-k lists with the static layout of the same mask. They run before the others.

dkernel autotunes 22 configurations per length: one to three minutes for its first case of a block size.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from rich.console import Console

from ..provenance import origin
from .cases import DEFAULT, GROUPS, parse_case, parse_cases
from .contenders import CONTENDERS
from .plot import draw
from .program import add_device, add_output, check_device, check_output, machine, write_results
from .report import summary
from .run import Record, Session, run_cases
from .run_time import measure, run_time_table, split_words
from .tables import break_even_table, case_table, launch_table, overview_table, short_table
from .timing import Clock, matmul_ceiling

_LAUNCHES = ("b128-l8-v16-8k", "b128-l8-v16-4k", "b128-l8-v16-2k")
_LAUNCH_SECONDS = 15


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a contender failed unexpectedly.

    Expected reasons are memory, support and time.
    """
    args = _parse(arguments)
    began = time.monotonic()
    device = torch.device(args.device)
    console = Console(width=170)
    seed = int.from_bytes(os.urandom(3))
    torch.manual_seed(seed)
    clock = Clock(device)
    data: Record = {
        **origin("kernels.benchmarks", arguments),
        "machine": machine(device),
        "seed": seed,
        "ceiling_tflops": matmul_ceiling(clock, device),
        "cases": [],
        "launches": [],
        "run_time": [],
        "summary": {},
    }
    console.print(f"{data['machine']['device']}, ceiling {data['ceiling_tflops']:.0f} TFLOP/s (matrix product)")
    # the last of the time is reserved for launches: a failed capture could make the device unusable for cases
    deadline = began + args.seconds
    session = Session(
        device,
        args.contenders,
        args.budget_ms,
        deadline - _LAUNCH_SECONDS * len(args.launches),
        seed,
        clock,
        ceiling_tflops=data["ceiling_tflops"],
        limit_seconds=args.limit_seconds,
    )

    def progress(line: str) -> None:
        console.print(f"[{time.monotonic() - began:4.0f} s] {line}", style="dim", markup=False)

    def save() -> None:
        data["seconds"] = time.monotonic() - began
        data["summary"] = summary(data["cases"])
        write_results(data, args.output)

    def report(record: Record) -> None:
        data["cases"].append(record)
        console.print(case_table(record, data["ceiling_tflops"]))
        save()

    for case in args.run_time:
        if time.monotonic() > session.deadline:
            progress(f"{case.name}: not run, out of time")
            continue
        progress(f"{case.name}: top-k lists")
        data["run_time"].append(measure(case, clock, device, args.budget_ms))
        save()
    if args.run_time:
        console.print(run_time_table(data["run_time"]))
    run_cases(session, args.cases, report, progress)
    if session.lost is None:
        data["ceiling_tflops_at_end"] = matmul_ceiling(clock, device)
    session.deadline = deadline
    for word in args.launches:
        progress(f"{word}: launches")
        data["launches"].append(session.launches(parse_case(word)))
        save()
    save()
    _show(console, data)
    try:
        draw(data, args.output.with_suffix(".png"), args.draw)
    except ValueError as error:
        console.print(f"no plot: {error}")
    failed = _unexpected(data)
    count = len(data["cases"]) + len(data["run_time"])
    console.print(f"{count} cases in {data['seconds']:.0f} s, {len(failed)} failures: {args.output}")
    return 1 if failed else 0


def _show(console: Console, data: Record) -> None:
    """Print the tables of all cases."""
    console.print(overview_table(data["cases"]))
    for record in data["launches"]:
        console.print(launch_table(record))
    if data["launches"]:
        console.print(short_table(data["launches"]))
    console.print(break_even_table(data["summary"]))


def _unexpected(data: Record) -> list[str]:
    """List the errors of contenders for other reasons than expected ones."""
    excused = ("not supported", "not run", "out of memory")
    errors = [r["error"] for r in data["run_time"] if "error" in r]
    errors += [r["error"] for case in data["cases"] for r in case["results"].values() if "error" in r]
    return [error for error in errors if not error.startswith(excused)]


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", default=None, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument(
        "--quick", action="store_true", help=f"the cases {' '.join(GROUPS['quick'])}, in about a minute"
    )
    add_output(parser, "benchmarks", "JSON; the plot is written to the same folder")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--launches", nargs="*", default=None, help="cases whose launch costs are measured")
    parser.add_argument("--budget-ms", type=float, default=None, help="device time of one contender's timed passes")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing new after this time")
    parser.add_argument(
        "--limit-seconds", type=float, default=20, help="skip contenders that need more for a case's passes"
    )
    parser.add_argument("--draw", default="b128-l8-v16-32k", help="mask and heads of the plot, length of its densities")
    add_device(parser)
    args = parser.parse_args(arguments)
    if args.quick and args.cases:
        parser.error("--quick chooses the cases: leave out --cases")
    try:
        words = args.cases or (["quick"] if args.quick else [*DEFAULT, "run-time"])
        args.run_time, others = split_words(words)
        args.cases = parse_cases(others)
        args.launches = list(_LAUNCHES) if args.launches is None else args.launches
        for word in (*args.launches, args.draw):
            parse_case(word)
    except ValueError as error:
        parser.error(str(error))
    check_output(parser, args)
    check_device(parser, args)
    args.budget_ms = args.budget_ms or (100 if args.quick else 1000)
    args.contenders = tuple(dict.fromkeys(args.contenders))
    return args


if __name__ == "__main__":
    sys.exit(main())
