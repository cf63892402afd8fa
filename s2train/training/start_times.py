"""Where the time before the first step goes."""

import os
import time
from pathlib import Path


class StartTimes:
    """Seconds of each part of a start, in order; the first is all that this process did before."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds = {"imports and plan": process_age()}

    def end(self, part: str) -> None:
        """Say that `part` is over, and what comes now another part's."""
        now = time.monotonic()
        self.seconds[part] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"


def process_age() -> float:
    """Seconds since the kernel started this process (Linux, proc(5): field 22 of stat, in clock ticks since boot)."""
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
