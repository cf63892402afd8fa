"""Settings of HyperAttention, and the intervals of keys that queries read."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import BLOCK_SIZES

_LARGEST_BLOCK = 128
_MOST_PROJECTIONS = 30


@dataclass(frozen=True)
class HyperSettings:
    """How many exact, similar and sampled keys a query reads.

    Attributes:
        bucket: keys of a bucket, a power of two from 16 to `shortest`.
        samples: keys drawn from each interval; an interval of fewer keys is read whole.
        projections: bits of the hash, 1 to 30. Take 2**projections far above the buckets of the longest interval.
        shortest: keys of the shortest interval, a power of two from 16; queries read their own interval exactly.
        window: keys before the query that are always exact, at least; a multiple of 16, at most `shortest`.
        sinks: first keys of the sequence, always exact; a multiple of 16, at most `shortest`.
    """

    bucket: int = 256
    samples: int = 256
    projections: int = 16
    shortest: int = 1024
    window: int = 256
    sinks: int = 128

    def __post_init__(self) -> None:
        for name in ("bucket", "shortest"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two of at least 16, got {value}")
        if self.bucket > self.shortest:
            raise ValueError(
                f"bucket {self.bucket} is larger than the shortest interval {self.shortest}: use smaller buckets"
            )
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}: without samples the result is biased")
        if not 1 <= self.projections <= _MOST_PROJECTIONS:
            raise ValueError(f"projections must be 1 to {_MOST_PROJECTIONS}, got {self.projections}")
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if value % BLOCK_SIZES[0] or not 0 <= value <= self.shortest:
                raise ValueError(
                    f"{name} must be a multiple of {BLOCK_SIZES[0]} from 0 to shortest = {self.shortest}, got {value}"
                )

    @property
    def block(self) -> int:
        """Tokens of a block: exact keys are whole blocks."""
        sizes = [size for size in BLOCK_SIZES if size <= _LARGEST_BLOCK]
        return max(size for size in sizes if not (self.shortest % size or self.window % size or self.sinks % size))


@dataclass(frozen=True)
class Level:
    """Intervals of one size, each with its own readers.

    Interval j covers keys [j * period, j * period + size). Its readers are queries from j * period + shift, `size` of
    them or up to the sequence's end.
    """

    number: int
    size: int
    count: int
    period: int
    shift: int

    def start(self, interval: int) -> int:
        """Return the interval's first key."""
        return interval * self.period

    def readers(self, interval: int, length: int) -> tuple[int, int]:
        """Return the range of queries that read the interval."""
        first = interval * self.period + self.shift
        return first, min(first + self.size, length)

    def reading(self, length: int) -> int:
        """Count the queries that read an interval of this level."""
        return sum(stop - first for first, stop in (self.readers(j, length) for j in range(self.count)))


def levels(settings: HyperSettings, length: int, causal: bool) -> list[Level]:
    """Return the levels of a sequence, shortest intervals first.

    Causal: a query in interval i of `shortest` keys reads those that the set bits of i name: they tile the past, and
    each is complete before its first reader. Not causal: one interval of all keys. A sequence of at most `shortest`
    tokens has none, and is exact.
    """
    shortest = settings.shortest
    if length <= shortest:
        return []
    if not causal:
        return [Level(0, length, 1, 0, 0)]
    found: list[Level] = []
    size = shortest
    while size < length:
        found.append(Level(len(found), size, -(-(length - size) // (2 * size)), 2 * size, size))
        size *= 2
    return found
