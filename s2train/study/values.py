"""Reads numbers of result files, and rejects other values."""

import math
from collections.abc import Mapping
from typing import Any


def number(content: Mapping[str, Any], name: str, above: float = -math.inf) -> float:
    """Return a finite number above a bound.

    Raises:
        ValueError: the value is another.
        LookupError: there is none.
    """
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < math.inf:
        raise ValueError(f"{name} is {value!r}")
    return value


def count(content: Mapping[str, Any], name: str, least: int = 0, most: float = math.inf) -> int:
    """Return a whole number between two bounds.

    Raises:
        ValueError: the value is another.
        LookupError: there is none.
    """
    value = content[name]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value
