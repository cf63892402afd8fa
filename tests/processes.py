"""Waits for processes, and says which still run."""

import time
from collections.abc import Callable
from pathlib import Path

_SECONDS = 400  # longer than anything takes on a busy machine: only a test that fails waits for so long


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Ask until it is so; fail if it never is."""
    until = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie, as in a container without init, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
