"""Where the time before the first step goes."""

import os
import time
from pathlib import Path

_LAUNCHERS = "TORCHELASTIC_RUN_ID"  # set by torchrun, and so by launch/job.py, for the ranks that they start


class StartTimes:
    """Seconds of each part of a start, in order, all by one clock.

    `launcher`, where one started this process, is its own life until then; `python` what this process did before
    `began`.

    Args:
        began: `time.monotonic()` where the program's own code began; None: now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = time.monotonic() if began is None else began
        ran = time.monotonic() - self._last
        self.seconds: dict[str, float] = {}
        age = _age("self")
        if age is not None:
            # A rank that was started again is as old as it is, not as its launcher.
            if _LAUNCHERS in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                launcher = _age(str(os.getppid()))
                if launcher is not None:
                    self.seconds["launcher"] = max(0.0, launcher - age)
            self.seconds["python"] = max(0.0, age - ran)

    def end(self, part: str) -> None:
        """Say that `part` is over, and what comes now another part's. A part may come in pieces."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all parts so far."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({parts})"


def _age(process: str) -> float | None:
    """Seconds since a process was started; None where /proc doesn't tell."""
    try:
        # The name, in brackets, may hold spaces. Clock ticks since the machine's start are its 22nd field.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return None
