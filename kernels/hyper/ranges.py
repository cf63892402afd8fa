"""Where each level's part of a plan's arrays begins."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from .settings import HyperSettings, Level, levels


@dataclass(frozen=True)
class Ranges:
    """Where a level's part of the flat arrays begins."""

    level: Level
    buckets: int  # of an interval
    samples: int
    interval_base: int
    key_base: int
    bucket_base: int
    query_base: int
    sample_base: int
    weight_base: int


def ranges_of(settings: HyperSettings, length: int, causal: bool, rows: int, group: int) -> tuple[Ranges, ...]:
    """Return the ranges of all levels, from shapes alone."""
    found = levels(settings, length, causal)
    buckets = [-(-level.size // settings.bucket) for level in found]
    samples = [min(settings.samples, level.size) for level in found]
    counts = [level.count for level in found]
    sizes = [level.size for level in found]

    def bases(of_interval: list[int], times: int) -> list[int]:
        each = (times * count * x for count, x in zip(counts, of_interval, strict=True))
        return list(accumulate(each, initial=0))

    columns = (
        bases([1] * len(found), rows),
        bases(sizes, rows),
        bases(buckets, rows),
        bases(sizes, rows * group),
        bases(samples, rows),
        list(accumulate(samples, initial=0)),
    )
    return tuple(
        Ranges(level, buckets[i], samples[i], *(column[i] for column in columns)) for i, level in enumerate(found)
    )


def tag_dtype(ranges: tuple[Ranges, ...], rows: int, settings: HyperSettings) -> torch.dtype:
    """Return the smallest dtype for interval and hash: sorted faster."""
    intervals = ranges[-1].interval_base + rows * ranges[-1].level.count
    return torch.int32 if intervals << settings.projections < 2**31 else torch.int64
