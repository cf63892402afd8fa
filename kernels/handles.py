"""Numbers that stand for objects where only numbers go: in the graphs that torch.compile makes."""

from __future__ import annotations

import itertools
import secrets
from typing import Any
from weakref import WeakValueDictionary

# Counted, so that a number names one object for good; from a random start, so that a number in a graph that another
# process wrote names none here.
_numbers = itertools.count(secrets.randbits(30) << 32 | 2)
_living: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(thing: Any) -> int:
    """The thing's number, as long as it lives. Never given out again."""
    number = next(_numbers)
    _living[number] = thing
    return number


def living() -> list[int]:
    """The numbers of all registered things that live."""
    return list(_living)


def registered(number: int) -> Any:
    """The thing with this number.

    Raises:
        RuntimeError: it lives no longer, or was never in this process.
    """
    thing = _living.get(number)
    if thing is None:
        raise RuntimeError(
            "the block layout of a compiled call is gone: keep the layout until the last backward of its calls is done"
        )
    return thing
