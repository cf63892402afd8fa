"""Prints progress: a line rewritten on a terminal, an occasional line elsewhere."""

import sys
import time
from datetime import timedelta
from typing import TextIO


class Meter:
    """Prints the progress of one stage.

    Args:
        stage: name of the stage, such as "tokenizing".
        total: total amount, in the unit of `done`.
        before: amount done before this started, which doesn't count for the speed.
        out: stream to write to; None: stderr.
        every: seconds between lines; None: 0.2 on a terminal, else 30.
    """

    def __init__(
        self, stage: str, total: int, *, before: int = 0, out: TextIO | None = None, every: float | None = None
    ) -> None:
        self._out = sys.stderr if out is None else out
        self._on_terminal = self._out.isatty()
        self._every = every if every is not None else 0.2 if self._on_terminal else 30.0
        self._stage, self._total, self._before = stage, max(1, total), before
        self._started = self._last_print = time.monotonic()

    def update(self, done: int, documents: int, size: int) -> None:
        """Print the progress, unless the last line is too recent.

        Args:
            done: amount done of `total`.
            documents: all documents so far.
            size: bytes of text since this started.
        """
        now = time.monotonic()
        if now - self._last_print < self._every:
            return
        self._last_print = now
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
