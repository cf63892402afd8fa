"""Lets a program know that launch/_deadline.py, which started it, waits for it."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Begins a program that signals its parent: before, the parent may not know it yet.
ONCE_WAITED_FOR = "import os, time\nwhile not os.path.exists(__file__ + '.waited'): time.sleep(0.01)\n"


class _Waited(subprocess.Popen):  # type: ignore[type-arg]
    def poll(self) -> int | None:
        self._note()
        return super().poll()

    def wait(self, timeout: float | None = None) -> int:
        self._note()
        return super().wait(timeout)

    def _note(self) -> None:
        Path(f"{self.args[1]}.waited").touch()  # type: ignore[index]


def note_waits(monkeypatch: pytest.MonkeyPatch, module: dict[str, Any]) -> None:
    """Have a module write `PROGRAM.waited` when it waits for a program."""
    own = SimpleNamespace(Popen=_Waited, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setitem(module, "subprocess", own)
