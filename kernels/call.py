"""What is kept of a call for later calls like it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .saved import Properties
from .spec import AttentionSpec

_KEPT = 8


@dataclass(eq=False, slots=True)
class Call:
    """Calls that differ in their tensors' addresses and values alone.

    - ``backend``: "triton", "portable" or "torch".
    - ``found_again``: whether a later call was like it. Only then are launches kept: preparing them takes about as
      long as a repeated call saves.
    - ``saved``: `saved.properties` of what the backward needs.
    - ``forward``, ``backward``: launches to repeat (`hopper/repeated.py`), those of the backward by `strides_of`.
    """

    spec: AttentionSpec
    backend: str
    found_again: bool = False
    saved: tuple[Properties, ...] | None = None
    forward: Any = None
    backward: dict[Hashable, Any] = field(default_factory=dict)


def keep(kept: dict[Any, Any], key: Hashable, value: Any) -> None:
    """Add an entry, in place of the oldest if there are many."""
    for oldest in list(kept)[: 1 - _KEPT]:  # of a copy: other threads may add entries meanwhile
        kept.pop(oldest, None)
    kept[key] = value


def strides_of(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(x.stride() for x in tensors)
