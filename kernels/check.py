"""Are the kernels right and fast on this GPU? `python -m s2train.kernels.check [--quick] [--json FILE]`

Compiles the kernels and compares output, log-sum-exp and gradients with a float64 oracle, then times them beside
torch's dense causal FlashAttention. Each case has a process of its own, so that one that fails, hangs or breaks
the CUDA context is one line of the table. Exits with 1 if any fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import spec
from .check_cases import CASES, QUICK_TIMINGS, TIMINGS, Case, Timing, case_names
from .check_run import check_case, time_case

_SECONDS = 420  # for one case, compilation included
_SUMMARY = ("out", "lse", "dq", "dk", "dv")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.check", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few cases, 8k timings only")
    parser.add_argument("--json", type=Path, help="write all results there")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="cases checked at a time")
    parser.add_argument("--no-timing", action="store_true", help="only check results")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the child process's case, as JSON
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(_run_one(json.loads(args.one))))
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: the interpreted kernels are checked by `pytest tests/kernels`", file=sys.stderr)
        return 1
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(machine, flush=True)

    cases = [CASES[name] for name in case_names(args.quick)]
    with ThreadPoolExecutor(args.jobs) as pool:
        checks = []
        for case, result in zip(cases, pool.map(_in_process, cases), strict=True):
            checks.append({"case": case.name} | result)
            print(_check_line(checks[-1]), flush=True)
    timings = []
    for timing in [] if args.no_timing else QUICK_TIMINGS if args.quick else TIMINGS:
        timings.append({"case": timing.name} | _in_process(timing))
        print(_timing_line(timings[-1]), flush=True)

    failed = [row["case"] for row in checks + timings if not row["ok"]]
    print(f"{len(checks)} checks, {len(timings)} timings, {len(failed)} failed {failed or ''}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "checks": checks, "timings": timings}, indent=1))
    return 1 if failed else 0


def _run_one(description: dict[str, Any]) -> dict[str, Any]:
    fields = description["fields"]
    torch.manual_seed(0)
    try:
        if description["timing"]:
            return time_case(Timing(**fields))
        spec.empty = _poison
        return check_case(Case(**fields), torch.device("cuda"))
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}


def _poison(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate kernel outputs as NaN, so that what a kernel leaves unwritten shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def _in_process(case: Case | Timing) -> dict[str, Any]:
    description = json.dumps({"timing": isinstance(case, Timing), "fields": asdict(case)})
    command = [sys.executable, "-m", "s2train.kernels.check", "--one", description]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no result after {_SECONDS} s"}
    try:
        result = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"ok": False, "error": f"exit status {done.returncode}: {last}"[:300]}
    return result if isinstance(result, dict) else {"ok": False, "error": f"odd output {result!r}"}


def _check_line(row: dict[str, Any]) -> str:
    verdict = "ok  " if row["ok"] else "FAIL"
    if "error" in row:
        return f"{verdict} {row['case']:<44} {row['error']}"
    errors = "  ".join(f"{name} {row[name][0]:.1e}/{row[name][1]:.1e}" for name in _SUMMARY)
    return f"{verdict} {row['case']:<44} {row['kernel']:<6} {errors}  (relative error, kernel/torch)"


def _timing_line(row: dict[str, Any]) -> str:
    verdict = "ok  " if row["ok"] else "FAIL"
    if "error" in row:
        return f"{verdict} {row['case']:<44} {row['error']}"
    return (
        f"{verdict} {row['case']:<44} {row['kernel']:<6} "
        f"forward {row['forward_ms']:.3f} ms {row['forward_tflops']:.0f} TFLOP/s  "
        f"backward {row['backward_ms']:.3f} ms {row['backward_tflops']:.0f} TFLOP/s  "
        f"dense flash {row['dense_forward_ms']:.3f} / {row['dense_backward_ms']:.3f} ms  "
        f"density {row['density']:.3f}"
    )


if __name__ == "__main__":
    sys.exit(main())
