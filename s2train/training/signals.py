"""Signals that ask a run to save and end: a scheduler's, and Ctrl-C."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from s2train.errors import STATUS_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Remembers the first of STOP_SIGNALS that this process got while listening.

    A save or a collective must not be torn, so that the loop looks here between steps. A second Ctrl-C ends the
    process at once.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number, 0: none
        self._pid = os.getpid()

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Handle the signals within; only a main thread may."""
        before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        if before[signal.SIGINT] is signal.SIG_IGN:  # of a shell's background job, which Ctrl-C isn't meant for
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            # The system's own handler ends a process also where it waits for ranks that don't come.
            for second in _seconds():
                signal.signal(second, signal.SIG_DFL)
            if os.environ.get("RANK", "0") == "0" and os.getpid() == self._pid:
                # not by print: the signal may have come within one
                os.write(2, b"SIGINT: saves after this step and ends; a second Ctrl-C ends at once\n")


def signal_name(number: int) -> str:
    """Such as ``SIGTERM``."""
    return signal.Signals(number).name


def _seconds() -> tuple[signal.Signals, ...]:
    """As what a second Ctrl-C comes: torchrun hands it on as SIGTERM, unless `launch/job.py` runs it."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and STATUS_FILE not in os.environ
    return (signal.SIGINT, signal.SIGTERM) if by_torchrun else (signal.SIGINT,)
