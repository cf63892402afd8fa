"""Measures the time before the first step, by part."""

import os
import time
from pathlib import Path

_LAUNCHED = "TORCHELASTIC_RUN_ID"  # torchrun, and so launch/job.py, sets it in the ranks that it starts


class StartTimes:
    """Seconds of each part of a program's start, in order.

    Parts are times of the main thread: what threads and other processes do meanwhile is in no part. The part
    `compilers` is the time for which the rank waits for such processes.

    The part `launcher` is the launcher's run time before it started this process, if there is a launcher. The part
    `shell and python` is this process's run time before `began`. Linux counts a process from its fork: where a shell
    script ends with `exec python …`, its time counts too.

    Args:
        began: `time.monotonic()` at which the program's own code began; None means now.
    """

    def __init__(self, began: float | None = None) -> None:
        self._last = time.monotonic() if began is None else began
        ran = time.monotonic() - self._last
        self.seconds: dict[str, float] = {}
        started = _started("self")
        if started is not None:
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
            # A restarted rank is much younger than its launcher, so the launcher's age is not start time.
            if _LAUNCHED in os.environ and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
                launched = _started(str(os.getppid()))
                if launched is not None:
                    self.seconds["launcher"] = max(0.0, started - launched)
            self.seconds["shell and python"] = max(0.0, age - ran)

    def end(self, part: str) -> None:
        """Add the time since the last call to `part`.

        A part may come in pieces.
        """
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Total seconds of all parts so far."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{self.total:.1f} s ({parts})"


def _started(process: str) -> float | None:
    """Seconds from boot to a process's start; None if unknown."""
    try:
        # The name, in brackets, may contain spaces. Field 22 is the start time, in clock ticks since boot.
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return None
