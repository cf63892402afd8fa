"""Where the time before the first step goes."""

import time

import psutil


class StartTimes:
    """Seconds of each part of a start, in order; the first is all that this process did before."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds = {"imports and plan": time.time() - psutil.Process().create_time()}

    def end(self, part: str) -> None:
        """Say that `part` is over, and what comes now another part's."""
        now = time.monotonic()
        self.seconds[part] = now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"{sum(self.seconds.values()):.1f} s ({parts})"
