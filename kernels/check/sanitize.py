"""Run compute-sanitizer on small calls of the kernels.

    python -m s2train.kernels.check.sanitize [--tool TOOL …] [--out FILE]

All cases of sanitize_cases run once without a tool, which compiles their kernels. Then each tool (memcheck, racecheck,
initcheck, synccheck) runs every case in a separate process, one tool after the other. The JSON has for each run: errors
found, warnings, kinds of reports, how many name a kernel of ours, the first in full, the last lines. Only our kernels
are checked, except by initcheck, which must see all writes. Exits with 1 if any case is not "clean".

racecheck supports ordinary barriers. Its reports on memory that asynchronous copies and mbarriers hand over between
specialised warps are recorded unchanged; a reader must judge them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from ..benchmarks.program import check_new, write_results
from .sanitize_cases import CASES, DONE
from .sanitize_report import KERNELS, parse

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
_PLAIN = "none"  # the run without a tool

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    args = _parse(arguments)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on PATH: install the CUDA toolkit, or add its bin folder", file=sys.stderr)
        return 2
    until = time.monotonic() + args.seconds
    data: Row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sanitizer": _output([sanitizer, "--version"]).splitlines()[-1:],
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "runs": [],
    }
    option = kernel_option(_output([sanitizer, "--help"]))

    for tool in (_PLAIN, *args.tool):
        prefix = [] if tool == _PLAIN else command(sanitizer, tool, option)

        def one(name: str, tool: str = tool, prefix: list[str] = prefix) -> Row:
            program = [*prefix, sys.executable, "-m", f"{__package__}.sanitize_cases", name]
            return run_one(tool, name, program, min(args.case_seconds, until - time.monotonic()))

        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(one, args.cases):
                data["runs"].append(row)
                print(line(row), flush=True)
                write_results(data, args.out)
    bad = [row for row in data["runs"] if row["verdict"] != "clean"]
    print(f"{len(data['runs'])} runs, {len(bad)} not clean: {args.out}")
    return 1 if bad else 0


def command(sanitizer: str, tool: str, option: str) -> list[str]:
    """Return compute-sanitizer's command for a tool; `option` filters by kernel name."""
    words = [sanitizer, "--tool", tool, "--print-limit", "200", "--error-exitcode", "99"]
    return words if tool == "initcheck" else [*words, option, f"kernel_substring={KERNELS}"]


def kernel_option(usage: str) -> str:
    """Return --kernel-name, or the older versions' name for it.

    The manual has the former.
    """
    return next((option for option in ("--kernel-name", "--kernel-regex") if option in usage), "--filter")


def run_one(tool: str, case: str, program: list[str], seconds: float) -> Row:
    """Run a program with a time limit.

    Return its output's findings and a verdict.
    """
    row: Row = {"tool": tool, "case": case}
    if seconds <= 0:
        return row | {"verdict": "not run: out of time", "seconds": 0.0}
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a pool would hide accesses past a tensor
    began = time.monotonic()
    process = subprocess.Popen(
        program, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, late = process.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tool's children too
        output, late = process.communicate()[0], True
    found = parse(output)
    done = next((line for line in output.splitlines() if line.startswith(DONE)), "")
    row |= {"kernels": done.removeprefix(DONE).strip(), "seconds": round(time.monotonic() - began, 1)}
    row |= {"status": process.returncode} | asdict(found)
    if late:
        verdict = f"stopped after {seconds:.0f} s"
    elif found.errors or found.warnings or found.kinds:  # includes launches that it could not follow
        verdict = "found something"
    elif not done:
        verdict = "the program failed"
    elif tool != _PLAIN and found.errors is None:
        verdict = "no summary"
    elif process.returncode:
        verdict = f"exit status {process.returncode}"
    else:
        verdict = "clean"
    return row | {"verdict": verdict}


def line(row: Row) -> str:
    """Format a row for a terminal."""
    words = f"{row['tool']:<10} {row['case']:<34} {row['verdict']:<22} {row['seconds']:>6.1f} s"
    if row.get("errors") is not None:
        words += f"  {row['errors']} errors, {row['warnings']} warnings, {row['in_ours']} reports name our kernels"
    words += f"  {row.get('kernels', '')}"
    if row["verdict"] == "clean":
        return words
    kinds = [f"    {count} × {kind}" for kind, count in row.get("kinds", {}).items()]
    return "\n".join([words, *(kinds or ["    " + text for text in row.get("last_lines", [])[-3:]])])


def _output(program: list[str]) -> str:
    return subprocess.run(program, capture_output=True, text=True, check=False).stdout


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.check.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    today = datetime.date.today().isoformat()
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing after this time")
    parser.add_argument("--case-seconds", type=float, default=100, help="for one case under one tool")
    parser.add_argument("--jobs", type=int, default=5, help="processes that share the GPU")
    parser.add_argument("--out", type=Path, default=Path(f"{today}-sanitizer.json"), help="JSON")
    args = parser.parse_args(arguments)
    check_new(parser, args.out, "--out")
    return args


if __name__ == "__main__":
    sys.exit(main())
