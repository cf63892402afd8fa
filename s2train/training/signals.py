"""Signals by which a scheduler asks a run to save and end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Remembers the first of STOP_SIGNALS that this process got while listening.

    A save or a collective must not be torn, so that the loop looks here between steps.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0: none

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Handle the signals within; only a main thread may."""
        before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number


def signal_name(number: int) -> str:
    """Such as ``SIGTERM``."""
    return signal.Signals(number).name
