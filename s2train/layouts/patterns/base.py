"""What every pattern is: which key blocks one head keeps.

Coordinates are blocks: query block i, key block j, distance d = i - j. A pattern is causal (d >= 0), always
keeps the diagonal, so that no row is empty, and is hashable: equal patterns share their storage and counts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


class PatternError(ValueError):
    """A pattern that can't be: which of its settings, the value, why, and the remedy.

    Who knows the setting's full name (layout.pattern.stride) makes a `ConfigError` of it.
    """

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting}={value}: {problem}. {remedy}")


def at_least(least: int, **settings: int) -> None:
    """Raises PatternError for the first setting below `least`."""
    for name, value in settings.items():
        if value < least:
            raise PatternError(name, value, "too small", f"Set it to {least} or more (blocks).")


class Pattern(ABC):
    """What a head keeps."""

    @abstractmethod
    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        """Is (query, key) kept? int64 block indices in, bool of the shape that they broadcast to out."""

    @abstractmethod
    def form(self) -> str:
        """A few words that tell it from other patterns, but not from those that a schedule shifts it to."""

    @property
    @abstractmethod
    def kv_efficient(self) -> bool:
        """Does no later query take up a key block again that one has dropped, at any length?

        Then its K/V can be freed while decoding.
        """

    @property
    def period(self) -> int:
        """How many patterns a schedule makes of it, by offsets 0 to period - 1; 1: a schedule does nothing to it."""
        return 1

    def shifted(self, offset: int) -> Self:
        """The pattern at another offset."""
        return self

    def describe(self) -> str:
        """`form`, and the offset where there is one."""
        return self.form()

    def narrower(self, widest: int) -> str:
        """The setting that gives it a period of `widest` or less, for an error's remedy."""
        raise NotImplementedError(f"{self.form()}: no schedule shifts it")


class BandedPattern(Pattern):
    """Keeps, within each band of distances, whole columns: countable in O(n).

    Band b holds the distances from ``limits[b - 1]`` (0 for the first) to below ``limits[b]``; the last band,
    ``len(limits)``, has no end.
    """

    @property
    @abstractmethod
    def limits(self) -> tuple[int, ...]:
        """Blocks, ascending."""

    @abstractmethod
    def columns(self, band: int, key: Tensor) -> Tensor:
        """Bool in the shape of `key` (int64 block indices): is the key block kept at the band's distances?"""

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        # Compared, not subtracted: no int64 intermediate of the broadcast shape.
        limits = self.limits
        kept = self.columns(len(limits), key) & (query >= key + (limits[-1] if limits else 0))
        start = 0
        for band, stop in enumerate(limits):
            kept |= self.columns(band, key) & (query >= key + start) & (query < key + stop)
            start = stop
        return kept


class DistancePattern(Pattern):
    """Keeps whole diagonals, whatever the key block: countable in O(n)."""

    @abstractmethod
    def distances(self, distance: Tensor) -> Tensor:
        """Bool in the shape of `distance` (int64 blocks, >= 0): is it kept?"""

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
    setting: str = "layout.pattern"  # that the pattern comes from, for errors


HeadPatterns = Callable[[LayerContext], tuple[Pattern, ...]]  # one pattern per query head


def scheduled(pattern: Pattern) -> HeadPatterns:
    """Heads of one pattern, shifted as the schedule says."""
    return lambda layer: tuple(pattern.shifted(offset) for offset in layer.offsets(pattern.period))


def ones(key: Tensor) -> Tensor:
    """True, in the shape of `key`."""
    return torch.ones_like(key, dtype=torch.bool)
