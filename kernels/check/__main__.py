"""Check and time the kernels on this GPU.

`python -m s2train.kernels.check [--quick | --only WORD …] [--json FILE]` compiles the kernels and compares output,
log-sum-exp and gradients with a float64 oracle, then times them and torch's dense causal FlashAttention. A case that
fails, hangs or breaks the CUDA context is reported in one line of the table; later cases run in new processes. Exits
with 1 if any case fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from ..benchmarks.program import check_new, write_results
from ..provenance import origin
from ..workers import run_tasks, serve
from .cases import CASES, QUICK_TIMINGS, TIMINGS, Case, Timing, case_names
from .poison import poisoned
from .run import check_case, time_case

_SECONDS = 240  # per case, including compilation
_WORKER = ["-m", "s2train.kernels.check", "--worker"]
_SUMMARY = ("out", "lse", "dq", "dk", "dv")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, 8k timings only")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose name contains any of these")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="cases checked at a time")
    parser.add_argument("--no-timing", action="store_true", help="only check results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(_run_one)
        return 0
    check_new(parser, args.json, "--json")
    if not torch.cuda.is_available():
        print("no CUDA device: the interpreted kernels are checked by `pytest tests/kernels`", file=sys.stderr)
        return 1
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    print(machine, flush=True)

    began = time.monotonic()
    cases = [CASES[name] for name in case_names(args.quick, args.only)]
    if not cases:
        parser.error(f"no case's name contains any of {args.only}")
    timings: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []

    def save() -> None:
        if args.json:
            write_results(
                {**origin("kernels.check"), "machine": machine, "checks": checks, "timings": timings}, args.json
            )

    check_cases(cases, args.jobs, checks, save)
    ran = {way: Counter(row.get(way) for row in checks)["hopper"] for way in ("forward", "backward")}
    print(
        f"{time.monotonic() - began:.0f} s; on Hopper's kernels: {ran['forward']} forward, {ran['backward']} backward"
    )
    wanted = [] if args.no_timing else QUICK_TIMINGS if args.quick else TIMINGS
    for timing, result in zip(wanted, run_tasks(_WORKER, [_task(x) for x in wanted], 1, _SECONDS), strict=True):
        timings.append({"case": timing.name} | result)
        print(_timing_line(timings[-1]), flush=True)
        save()

    failed = [row["case"] for row in checks + timings if not row["ok"]]
    print(f"{len(checks)} checks, {len(timings)} timings, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


def check_cases(cases: Sequence[Case], jobs: int, rows: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Check cases, `jobs` at a time, and add a row for each.

    Cases that found the GPU's memory full of others are checked again, one at a time.

    Args:
        save: called after each case.
    """
    for case, result in zip(cases, run_tasks(_WORKER, [_task(x) for x in cases], jobs, _SECONDS), strict=True):
        rows.append({"case": case.name} | result)
        print(_check_line(rows[-1]), flush=True)
        save()
    full = [at for at, row in enumerate(rows) if jobs > 1 and row.get("error", "").startswith("OutOfMemoryError")]
    again = [_task(cases[at]) for at in full]
    for at, result in zip(full, run_tasks(_WORKER, again, 1, _SECONDS), strict=True):
        rows[at] = {"case": cases[at].name, "first_error": rows[at]["error"]} | result
        print(_check_line(rows[at]), flush=True)
        save()


def _task(case: Case | Timing) -> dict[str, Any]:
    return {"timing": isinstance(case, Timing), "fields": asdict(case)}


def _run_one(task: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    if task["timing"]:
        return time_case(Timing(**task["fields"]))
    with poisoned():
        result = check_case(Case(**task["fields"]), torch.device("cuda"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # for the cases of other processes
    return result


def _check_line(row: dict[str, Any]) -> str:
    verdict = "ok  " if row["ok"] else "FAIL"
    if "error" in row:
        return f"{verdict} {row['case']:<44} {row['error']}"
    errors = "  ".join(f"{name} {row[name][0]:.1e}/{row[name][1]:.1e}" for name in _SUMMARY)
    choices = f"  [{row['choices']}]" if row["choices"] else ""
    return (
        f"{verdict} {row['case']:<44} {row['forward']:<6} {row['backward']:<6} {errors}  (relative error, kernel/torch)"
        f"{choices}"
    )


def _timing_line(row: dict[str, Any]) -> str:
    verdict = "ok  " if row["ok"] else "FAIL"
    if "error" in row:
        return f"{verdict} {row['case']:<44} {row['error']}"
    return (
        f"{verdict} {row['case']:<44} {row['forward']:<6} {row['backward']:<6} "
        f"forward {row['forward_ms']:.3f} ms {row['forward_tflops']:.0f} TFLOP/s  "
        f"backward {row['backward_ms']:.3f} ms {row['backward_tflops']:.0f} TFLOP/s  "
        f"dense flash {row['dense_forward_ms']:.3f} / {row['dense_backward_ms']:.3f} ms  "
        f"density {row['density']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
