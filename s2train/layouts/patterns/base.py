"""Base classes of patterns: which key blocks one head keeps.

Coordinates are blocks: query block i, key block j, distance d = i - j. A pattern is causal (d >= 0) and always keeps
the diagonal, so that no row is empty. It is hashable: equal patterns share their storage and counts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from s2train.errors import as_typed


class PatternError(ValueError):
    """An invalid pattern setting: its name, value, problem and remedy.

    The caller that knows the setting's full name (layout.pattern.stride) converts it to a `ConfigError`.
    """

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting}={as_typed(value)}: {problem}. {remedy}")


def at_least(least: int, **settings: int) -> None:
    """Raise PatternError for the first setting below `least`."""
    for name, value in settings.items():
        if value < least:
            raise PatternError(name, value, "too small", f"Set it to {least} or more (blocks).")


class Pattern(ABC):
    """Which key blocks a head keeps."""

    @abstractmethod
    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        """Return whether (query, key) is kept.

        Takes int64 block indices that broadcast, and returns a bool of the broadcast shape.
        """

    @abstractmethod
    def form(self) -> str:
        """Describe the pattern in a few words, without its offset."""

    @property
    @abstractmethod
    def kv_efficient(self) -> bool:
        """Whether a dropped key block is never read again, at any length.

        Its K/V can then be freed while decoding.
        """

    @property
    def period(self) -> int:
        """Number of distinct patterns that a schedule makes.

        Their offsets are 0 to period - 1. 1 means that a schedule changes nothing.
        """
        return 1

    def shifted(self, offset: int) -> Self:
        """Return the pattern with another offset."""
        return self

    def describe(self) -> str:
        """Return `form`, with the offset if there is one."""
        return self.form()

    def narrower(self, widest: int) -> str:
        """Return the setting that reduces the period to `widest`.

        Errors suggest it as the remedy.
        """
        raise NotImplementedError(f"{self.form()}: no schedule shifts it")


class BandedPattern(Pattern):
    """Pattern that keeps whole columns within bands of distances; counted in O(n).

    Band b holds the distances from ``limits[b - 1]`` (0 for the first) up to, not including, ``limits[b]``. The last
    band, ``len(limits)``, is unlimited.
    """

    @property
    @abstractmethod
    def limits(self) -> tuple[int, ...]:
        """Limits of the bands in blocks, ascending."""

    @abstractmethod
    def columns(self, band: int, key: Tensor) -> Tensor:
        """Return which key blocks (int64) are kept in a band.

        Bool in their shape.
        """

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        # Compare instead of subtracting: no int64 intermediate of the broadcast shape.
        limits = self.limits
        kept = self.columns(len(limits), key) & (query >= key + (limits[-1] if limits else 0))
        start = 0
        for band, stop in enumerate(limits):
            kept |= self.columns(band, key) & (query >= key + start) & (query < key + stop)
            start = stop
        return kept


class DistancePattern(Pattern):
    """Pattern that keeps whole diagonals; counted in O(n)."""

    @abstractmethod
    def distances(self, distance: Tensor) -> Tensor:
        """Return which distances (int64 blocks, >= 0) are kept.

        Bool in their shape.
        """

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        return (distance >= 0) & self.distances(distance)


@dataclass(frozen=True)
class LayerContext:
    """What the patterns of a layer's heads may depend on."""

    layer: int  # in the model, from 0
    num_heads: int
    num_query_groups: int  # KV heads; divides num_heads
    block_size: int  # tokens
    offsets: Callable[[int], tuple[int, ...]]  # period -> the schedule's offset of every query head
    setting: str = "layout.pattern"  # the pattern's setting, for errors
    num_layers: int | None = None  # of the model, if known


HeadPatterns = Callable[[LayerContext], tuple[Pattern, ...]]  # one pattern per query head


def scheduled(pattern: Pattern) -> HeadPatterns:
    """Give all heads one pattern, shifted by the schedule's offsets."""
    return lambda layer: tuple(pattern.shifted(offset) for offset in layer.offsets(pattern.period))


def ones(key: Tensor) -> Tensor:
    """Return True in the shape of `key`."""
    return torch.ones_like(key, dtype=torch.bool)
