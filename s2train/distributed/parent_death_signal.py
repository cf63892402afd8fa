"""Helper processes that must not outlive a process that was killed. Imports nothing slow: they start with it."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent dies


def end_with_the_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """From now on, this process gets the signal when its parent's thread ends, however that comes about."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
