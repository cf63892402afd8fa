"""How far long work on files is: one line that is rewritten on a terminal, and now and then a line elsewhere."""

import sys
import time
from datetime import timedelta
from typing import TextIO


class Meter:
    """Progress of one stage.

    Args:
        stage: what is done, such as "tokenizing".
        total: of the unit that `done` is told in.
        before: what of it was done when this started, which says nothing about the speed now.
        out: where to.
        every: seconds between lines; None: 0.2 on a terminal, else 30.
    """

    def __init__(
        self, stage: str, total: int, *, before: int = 0, out: TextIO | None = None, every: float | None = None
    ) -> None:
        self._out = sys.stderr if out is None else out
        self._on_terminal = self._out.isatty()
        self._every = every if every is not None else 0.2 if self._on_terminal else 30.0
        self._stage, self._total, self._before = stage, max(1, total), before
        self._started = self._told = time.monotonic()

    def update(self, done: int, documents: int, size: int) -> None:
        """Tell, if it is time to.

        Args:
            done: of `total`.
            documents: so far, all of them.
            size: bytes of text, since this started.
        """
        now = time.monotonic()
        if now - self._told < self._every:
            return
        self._told = now
        seconds = now - self._started
        text = f"{self._stage}: {done / self._total:.0%}, {documents:,} documents, {size / seconds / 1e6:,.1f} MB/s"
        if done > self._before:
            left = seconds * (self._total - done) / (done - self._before)
            text += f", {timedelta(seconds=round(left))} left"
        self._out.write(f"\r{text:<80}" if self._on_terminal else f"{text}\n")
        self._out.flush()

    def close(self) -> None:
        """End the line."""
        if self._on_terminal:
            self._out.write("\n")
