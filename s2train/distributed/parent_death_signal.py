"""Ends helper processes when their parent dies.

Imports nothing slow, since helper processes start with it.
"""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1  # Linux's prctl option: the signal to send when the parent dies


def signal_on_parent_death(by: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux signal this process when its parent's thread ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
