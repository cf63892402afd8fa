"""Pattern of context ranges, each with its own stride."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from torch import Tensor

from s2train.layouts.patterns.base import BandedPattern, PatternError, at_least, ones

_EXAMPLE = "Write them nearest first as [limit, stride] in blocks, such as [[16,1],[256,8],[null,32]]."


@dataclass(frozen=True)
class Ranges(BandedPattern):
    """Keep strided columns within each range, and sinks.

    A range keeps the key blocks with (j - offset) mod stride = 0. ``ranges`` are (limit, stride), nearest first, with
    exclusive limits; the last limit is None. A stride of 1 is the local window. The diagonal is kept for any first
    stride. The pattern is KV-efficient if each stride divides the next: the shared offset then selects matching columns
    in all ranges.

    Raises:
        PatternError: limits that don't ascend or end, or a stride below 1.
    """

    ranges: tuple[tuple[int | None, int], ...]
    offset: int
    sinks: int = 0

    def __post_init__(self) -> None:
        at_least(0, sinks=self.sinks)
        shown = [list(part) for part in self.ranges]
        if not self.ranges or self.ranges[-1][0] is not None:
            raise PatternError("ranges", shown, "the last range must be unlimited", _EXAMPLE)
        limits = [limit for limit, _ in self.ranges[:-1]]
        if None in limits or any(before >= after for before, after in pairwise([0, *limits])):  # type: ignore[operator]
            raise PatternError("ranges", shown, "the limits must ascend from 1", _EXAMPLE)
        if any(stride < 1 for _, stride in self.ranges):
            raise PatternError("ranges", shown, "a stride below 1", _EXAMPLE)
        object.__setattr__(self, "offset", self.offset % self.period)

    @classmethod
    def read(cls, ranges: Any, sinks: int) -> Self:
        """Read ranges from a setting.

        The setting is a list of [limit, stride]; the last limit is null. Raises PatternError for anything else.
        """
        if not _is_ranges(ranges):
            raise PatternError("ranges", ranges, "not a list of ranges", _EXAMPLE)
        return cls(tuple((limit, stride) for limit, stride in ranges), 0, sinks)

    @property
    def _bands(self) -> tuple[tuple[int | None, int], ...]:
        """Return the ranges, adding one for the diagonal if needed.

        A first stride of 1 needs none.
        """
        return self.ranges if self.ranges[0][1] == 1 or self.ranges[0][0] == 1 else ((1, 1), *self.ranges)

    @property
    def limits(self) -> tuple[int, ...]:
        return tuple(limit for limit, _ in self._bands if limit is not None)

    def columns(self, band: int, key: Tensor) -> Tensor:
        stride = self._bands[band][1]
        if band == 0:  # includes the diagonal
            return ones(key)
        return ((key - self.offset) % stride == 0) | (key < self.sinks)

    @property
    def kv_efficient(self) -> bool:
        return all(after % before == 0 for (_, before), (_, after) in pairwise(self._bands[1:]))

    @property
    def period(self) -> int:
        return max(stride for _, stride in self.ranges)

    def shifted(self, offset: int) -> Self:
        return replace(self, offset=offset)

    def form(self) -> str:
        sinks = f", sinks {self.sinks}" if self.sinks else ""
        parts = [f"stride {stride}" + (f" up to {limit}" if limit else " beyond") for limit, stride in self.ranges]
        return f"{', '.join(parts)}{sinks}"

    def describe(self) -> str:
        return f"{self.form()}, offset {self.offset}"

    def narrower(self, widest: int) -> str:
        return f"ranges with strides of {widest} or less"


def _is_ranges(given: Any) -> bool:
    def is_count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    return isinstance(given, Sequence) and all(
        isinstance(part, Sequence) and len(part) == 2 and (part[0] is None or is_count(part[0])) and is_count(part[1])
        for part in given
    )
