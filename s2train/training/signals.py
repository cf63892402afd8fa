"""Handles signals that ask a run to save and exit.

A scheduler sends them, or Ctrl-C.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from s2train.distributed.ranks import is_rank_0
from s2train.errors import STATUS_FILE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Stores the first of STOP_SIGNALS that this process receives while listening.

    A save or a collective must not be interrupted, so the training loop reads `received` between steps. A second
    Ctrl-C kills the process immediately.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0 means none
        self._pid = os.getpid()

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Handle the signals inside this context; main thread only."""
        before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        if before[signal.SIGINT] is signal.SIG_IGN:  # a shell's background job must ignore Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if number == signal.SIGINT:
            # The default handler kills the process even while it waits for other ranks in a collective.
            for second in _second_interrupts():
                signal.signal(second, signal.SIG_DFL)
            if is_rank_0() and os.getpid() == self._pid:
                # os.write, because print is not reentrant and the signal may interrupt one
                os.write(
                    2, b"SIGINT: saving after this or the next step, then exiting; press Ctrl-C again to exit now\n"
                )


def signal_name(number: int) -> str:
    """Name of a signal, such as ``SIGTERM``."""
    return signal.Signals(number).name


def _second_interrupts() -> tuple[signal.Signals, ...]:
    """Signals that a second Ctrl-C can arrive as.

    torchrun forwards Ctrl-C as SIGTERM, unless `launch/job.py` runs it.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and STATUS_FILE not in os.environ
    return (signal.SIGINT, signal.SIGTERM) if by_torchrun else (signal.SIGINT,)
