"""Numbers that stand for objects in the graphs of torch.compile."""

from __future__ import annotations

import itertools
import secrets
from typing import Any
from weakref import WeakValueDictionary

# A counter, so that a number is never used twice. The start is random, so that a number in a graph from another process
# is unknown here.
_numbers = itertools.count(secrets.randbits(30) << 32 | 2)
_live: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(thing: Any) -> int:
    """Return the object's number, valid while the object is alive; never reused."""
    number = next(_numbers)
    _live[number] = thing
    return number


def live_numbers() -> list[int]:
    """Return the numbers of all registered objects that are alive."""
    return list(_live)


def registered(number: int) -> Any:
    """Return the object with this number.

    Raises:
        RuntimeError: the object was freed, or the number is from another process.
    """
    thing = _live.get(number)
    if thing is None:
        raise RuntimeError(
            "the block layout of a compiled call was freed: keep the layout until the last backward of its calls"
        )
    return thing
