"""Which key blocks one head keeps, in closed form.

Coordinates are blocks: query block i, key block j, distance d = i - j. A pattern is causal (d >= 0), always
keeps the diagonal, so that no row is empty, and is hashable: equal patterns share their storage and counts.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from s2train.errors import ConfigError


class Pattern(Protocol):
    """What a head keeps."""

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        """Is (query, key) kept? int64 block indices in, bool of the shape that they broadcast to out."""
        ...

    def describe(self) -> str:
        """A few words for logs and pictures."""
        ...


@runtime_checkable
class ColumnPattern(Pattern, Protocol):
    """A pattern that keeps d < `local` and, beyond, whole columns: what it keeps can be counted in O(n)."""

    @property
    def local(self) -> int:
        """Blocks of the local window, the diagonal among them; >= 1."""
        ...

    def columns(self, key: Tensor) -> Tensor:
        """Bool, in the shape of `key` (int64 block indices): is the block kept at every distance?"""
        ...


@dataclass(frozen=True)
class Dense:
    """Keeps every causal block."""

    @property
    def local(self) -> int:
        return 1

    def columns(self, key: Tensor) -> Tensor:
        return torch.ones_like(key, dtype=torch.bool)

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def describe(self) -> str:
        return "dense"


@dataclass(frozen=True)
class LocalVertical:
    """Keeps d < local, each key block with (j - offset) mod stride = 0, and the first `sinks` key blocks.

    The offset is stored modulo the stride. A key block that leaves the window and is neither column nor sink
    is never taken up again: its K/V can be freed while decoding (KV-efficient).

    Raises:
        ConfigError: local or stride below 1, or sinks below 0.
    """

    local: int
    stride: int
    offset: int
    sinks: int = 0

    def __post_init__(self) -> None:
        for name, least in (("local", 1), ("stride", 1), ("sinks", 0)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"layout.pattern.{name}", value, "too small", f"Set it to {least} or more (blocks).")
        object.__setattr__(self, "offset", self.offset % self.stride)

    def columns(self, key: Tensor) -> Tensor:
        return ((key - self.offset) % self.stride == 0) | (key < self.sinks)

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        # Compared, not subtracted: no int64 intermediate of the broadcast shape.
        return (query >= key) & ((query < key + self.local) | self.columns(key))

    def describe(self) -> str:
        sinks = f", sinks {self.sinks}" if self.sinks else ""
        return f"local {self.local}, stride {self.stride}, offset {self.offset}{sinks}"
