"""Reports in one line why a program of this folder can't start.

Covers a missing package, an invalid OMP_NUM_THREADS, and Ctrl-C during imports. A notebook's MPLBACKEND has no effect.
Import it before everything outside the standard library.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

BEGAN = time.monotonic()  # start of the start-up times

_ROOT = Path(__file__).parents[1]
_STATUS = 2  # bad input, as in s2train/command_line/program.py, which may not be importable
_RANK_0_SECONDS = 10.0  # for rank 0 to print: torchrun kills all ranks when one exits


def check_threads() -> None:
    """Exit unless OMP_NUM_THREADS is a number or a comma-separated list of numbers."""
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None or all(part.strip().isdecimal() and int(part) > 0 for part in given.split(",")):
        return
    _reject(f"OMP_NUM_THREADS={given}: not a number of threads. Set it to one, such as 1, or unset it")


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report an uncaught exception; Python's excepthook."""
    if issubclass(kind, KeyboardInterrupt):
        if _is_first():
            print("interrupted", file=sys.stderr, flush=True)
        return  # Python then exits by the signal
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if not package or importlib.util.find_spec(package) is not None:
        sys.__excepthook__(kind, error, trace)
    elif _is_first():
        install = f"Install what s2train needs: {sys.executable} -m pip install -c constraints.txt -e . in {_ROOT}"
        ready = _ROOT / ".venv" / "bin" / "python"
        remedy = f"Run it with {ready}" if ready.exists() and ready != Path(sys.executable) else install
        print(f"error: {sys.executable}: package {package} is not installed. {remedy}", file=sys.stderr, flush=True)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _reject(line: str) -> NoReturn:
    if _is_first():
        print(f"error: {line}", file=sys.stderr, flush=True)
    else:
        time.sleep(_RANK_0_SECONDS)
    sys.exit(_STATUS)


sys.excepthook = _report
# Programs draw to files only. A notebook names a backend that may not be installed here, and matplotlib's import fails.
os.environ["MPLBACKEND"] = "agg"
check_threads()
