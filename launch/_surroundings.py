"""Prints in one line, from its import on, why a program of this folder can't start.

A package is missing, OMP_NUM_THREADS is no number, Ctrl-C comes during imports. Import it before all that is not
Python's own.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

BEGAN = time.monotonic()  # for the times of a start

_ROOT = Path(__file__).parents[1]
_STATUS = 2  # of bad input, as in s2train/command_line/program.py, which may not be there
_SECONDS_TO_SPEAK = 10.0  # that rank 0 has; torchrun ends all ranks when one has ended


def check_threads() -> None:
    """Whether OMP_NUM_THREADS is what OpenMP reads: a number, or several with commas between; else exits."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or all(part.strip().isdecimal() and int(part) > 0 for part in given.split(",")):
        return
    _reject(f"OMP_NUM_THREADS={given}: not a number of threads. Set it to one, such as 1, or unset it")


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What Python calls for an exception that nobody caught."""
    if issubclass(kind, KeyboardInterrupt):
        if _is_first():
            print("interrupted", file=sys.stderr, flush=True)
        return  # Python ends by the signal itself
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or importlib.util.find_spec(package) is not None:
        sys.__excepthook__(kind, error, trace)
    elif _is_first():
        install = f"Install what s2train needs: {sys.executable} -m pip install -c constraints.txt -e . in {_ROOT}"
        ready = _ROOT / ".venv" / "bin" / "python"
        remedy = f"Run it by {ready}" if ready.exists() and ready != Path(sys.executable) else install
        print(f"error: {sys.executable}: has no package {package}. {remedy}", file=sys.stderr, flush=True)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _reject(line: str) -> NoReturn:
    if _is_first():
        print(f"error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SECONDS_TO_SPEAK)
    sys.exit(_STATUS)


sys.excepthook = _report
check_threads()
