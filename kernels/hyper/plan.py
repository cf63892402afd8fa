"""Plan a call: sort keys, find buckets, draw samples.

Everything is computed on the device, in sizes that follow from shapes alone, so that the host never waits. A row is a
KV head of a sequence. Arrays are flat and ordered by level, then row, then interval: all levels share one sort of keys,
one search and one sort of queries, and each level's part is a range known to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .hashing import draw_slots, strata
from .ranges import Ranges, ranges_of, tag_dtype
from .settings import HyperSettings, Level


@dataclass(frozen=True)
class Plan:
    """Keys and queries of all levels as kernels read them.

    Arrays are int32 but for `sample_weights`.

    Attributes:
        keys: positions of keys, sorted by hash in each interval: [levels, rows, intervals, size] flat.
        own_buckets: each query's bucket in its interval, in order of positions: [levels, rows, group, intervals, size].
        queries: queries sorted by bucket, as member * length + position within a row.
        bucket_starts: [buckets of all levels + 1]: the range of `queries` of each bucket.
        sample_keys, sample_buckets: positions and buckets of sampled keys: [levels, rows, intervals, samples].
        sample_weights: float32 base-2 logarithms of the samples' weights: [levels, samples].
    """

    length: int
    rows: int
    group: int
    ranges: tuple[Ranges, ...]
    keys: Tensor
    own_buckets: Tensor
    queries: Tensor
    bucket_starts: Tensor
    sample_keys: Tensor
    sample_buckets: Tensor
    sample_weights: Tensor

    def sizes(self) -> tuple[int, int, int, tuple[Ranges, ...]]:
        """Return what is no array, in the order of the fields."""
        return self.length, self.rows, self.group, self.ranges

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the arrays in order, to be saved by autograd."""
        return (
            self.keys, self.own_buckets, self.queries, self.bucket_starts, self.sample_keys, self.sample_buckets,
            self.sample_weights,
        )  # fmt: skip


def make_plan(
    q_ranks: Tensor,
    k_ranks: Tensor,
    settings: HyperSettings,
    sample_seeds: Tensor,
    causal: bool,
    *,
    kernels: bool = False,
) -> Plan:
    """Sort keys and queries by their hashes, and draw samples.

    Hashes are int32 [b, H, n] and [b, H_kv, n].

    There is at least one level: the sequence is longer than the shortest interval. Raises ValueError for more entries
    than 32 bits can count.

    Args:
        kernels: make the same plan with Triton kernels.
    """
    batch, kv_heads, length = k_ranks.shape
    rows, group = batch * kv_heads, q_ranks.shape[1] // kv_heads
    ranges = ranges_of(settings, length, causal, rows, group)
    entries = ranges[-1].query_base + rows * group * ranges[-1].level.count * ranges[-1].level.size
    if max(entries, group * length) >= 2**31:
        raise ValueError(f"{entries} pairs of queries and intervals are too many: split the batch or the heads")
    if kernels:
        # imported here so that a process without Triton can make plans
        from . import plan_kernels

        ordered, keys = plan_kernels.sort_keys(k_ranks, ranges, settings, causal)
        buckets = plan_kernels.find_buckets(q_ranks, ordered, ranges, settings, rows, causal)
        own_buckets, of_all, num_buckets = buckets
        queries, bucket_starts = plan_kernels.sort_queries(
            of_all, num_buckets, ranges, length, rows, group, settings, causal
        )
    else:
        ordered, keys = sort_keys(k_ranks, ranges, settings)
        own_buckets, of_all, num_buckets = find_buckets(q_ranks, ordered, ranges, settings, rows)
        queries, bucket_starts = sort_queries(of_all, num_buckets, ranges, length, rows, group)
    return Plan(
        length, rows, group, ranges, keys, own_buckets, queries, bucket_starts,
        *draw_samples(keys, ranges, rows, settings, sample_seeds),
    )  # fmt: skip


def sort_keys(k_ranks: Tensor, ranges: tuple[Ranges, ...], settings: HyperSettings) -> tuple[Tensor, Tensor]:
    """Sort keys by hash within each interval, in one sort over all.

    Returns:
        The sorted hashes, each with its interval's number in front, and the keys' positions.
    """
    batch, kv_heads, length = k_ranks.shape
    rows, dtype = batch * kv_heads, tag_dtype(ranges, batch * kv_heads, settings)
    tagged = torch.cat([_tagged(k_ranks.reshape(rows, 1, length), r, settings, dtype, 0) for r in ranges])
    ordered, where = tagged.sort(stable=True)
    return ordered, torch.cat([_positions(r, rows, 1, 0, length, where.device) for r in ranges])[where]


def find_buckets(
    q_ranks: Tensor, ordered: Tensor, ranges: tuple[Ranges, ...], settings: HyperSettings, rows: int
) -> tuple[Tensor, Tensor, int]:
    """Find each query's bucket at each level.

    Returns:
        The bucket within the interval, the bucket counted over all levels, and how many these are.
    """
    length = q_ranks.shape[-1]
    of_rows = q_ranks.reshape(rows, -1, length)
    # of each bucket: ascending over all of them
    firsts = torch.cat([_of_level(ordered, r, rows)[..., :: settings.bucket].flatten() for r in ranges])
    tagged = torch.cat([_tagged(of_rows, r, settings, ordered.dtype, r.level.shift) for r in ranges])
    return *_buckets(tagged, firsts, ranges, rows, of_rows.shape[1]), len(firsts)


def sort_queries(
    of_all: Tensor, num_buckets: int, ranges: tuple[Ranges, ...], length: int, rows: int, group: int
) -> tuple[Tensor, Tensor]:
    """Sort queries by bucket; return them, and where each bucket's begin."""
    by_bucket, where = of_all.sort(stable=True)
    positions = [_positions(r, rows, group, r.level.shift, length, where.device) for r in ranges]
    every = torch.arange(num_buckets + 1, dtype=torch.int32, device=where.device)
    return torch.cat(positions)[where], torch.searchsorted(by_bucket, every, out_int32=True)


def tiles(plan: Plan, tile_rows: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cut each bucket's queries into tiles.

    Returns:
        int32 [tiles, 3]: bucket counted over all levels (-1: no tile), first query and end of the bucket's queries; and
        each level's range of tiles. Ranges are as long as the tiles can become.
    """
    starts = plan.bucket_starts.long()
    of_bucket = (starts.diff() + tile_rows - 1) // tile_rows
    ends = of_bucket.cumsum(0)
    ranges, parts, first = [], [], 0
    for r in plan.ranges:
        buckets = plan.rows * r.level.count * r.buckets
        most = plan.rows * plan.group * r.level.reading(plan.length) // tile_rows + buckets
        before = ends[r.bucket_base - 1] if r.bucket_base else torch.zeros_like(ends[0])
        tile = torch.arange(most, device=starts.device) + before
        parts.append(torch.where(tile < ends[r.bucket_base + buckets - 1], tile, -1))
        ranges.append((first, first + most))
        first += most
    tile = torch.cat(parts)
    bucket = torch.searchsorted(ends, tile, right=True)
    start = starts[bucket] + (tile - ends[bucket] + of_bucket[bucket]) * tile_rows
    table = torch.stack([torch.where(tile < 0, -1, bucket), start, starts[bucket + 1]], 1)
    return table.to(torch.int32), ranges


def _tagged(ranks: Tensor, r: Ranges, settings: HyperSettings, dtype: torch.dtype, shift: int) -> Tensor:
    """Return a level's hashes with their interval's number in front.

    They are flat [rows, members, intervals, size].

    Rows beyond the sequence, which only readers have, are -1.
    """
    rows, level = len(ranks), r.level
    number = torch.arange(rows * level.count, dtype=dtype, device=ranks.device) + r.interval_base
    number = number.view(rows, 1, level.count, 1) << settings.projections
    taken = _windows(ranks, level, shift).to(dtype)
    return torch.where(taken < 0, -1, taken + number).flatten()


def _windows(x: Tensor, level: Level, shift: int) -> Tensor:
    """Cut x [..., length] into intervals [..., intervals, size].

    They begin at `shift` in every `period`, with -1 beyond the length.
    """
    if level.period == 0:
        return x[..., None, :]
    beyond = level.count * level.period - x.shape[-1]
    x = torch.nn.functional.pad(x, (0, max(0, beyond)), value=-1)[..., : level.count * level.period]
    return x.unflatten(-1, (level.count, level.period))[..., shift : shift + level.size]


def _positions(r: Ranges, rows: int, members: int, shift: int, length: int, device: torch.device) -> Tensor:
    """Return member * length + position of a level's entries."""
    level = r.level
    member = torch.arange(members, dtype=torch.int32, device=device)[:, None, None] * length
    interval = torch.arange(level.count, dtype=torch.int32, device=device)[:, None] * level.period + shift
    at = member + interval + torch.arange(level.size, dtype=torch.int32, device=device)
    return at.expand(rows, *at.shape).flatten()


def _of_level(keys: Tensor, r: Ranges, rows: int) -> Tensor:
    level = r.level
    return keys[r.key_base : r.key_base + rows * level.count * level.size].view(rows, level.count, level.size)


def _buckets(
    tagged: Tensor, firsts: Tensor, ranges: tuple[Ranges, ...], rows: int, group: int
) -> tuple[Tensor, Tensor]:
    """Number each query's bucket, in its interval and over all levels.

    Of several buckets that hold its hash it is the middle one. Rows beyond the sequence come after all buckets.
    """
    lowest = torch.searchsorted(firsts, tagged, out_int32=True) - 1
    highest = torch.searchsorted(firsts, tagged, right=True, out_int32=True) - 1
    own, of_all = [], []
    for r in ranges:
        level = r.level
        entries = slice(r.query_base, r.query_base + rows * group * level.count * level.size)
        base = torch.arange(rows * level.count, dtype=torch.int32, device=tagged.device) * r.buckets + r.bucket_base
        base = base.view(rows, 1, level.count, 1)
        shape = (rows, group, level.count, level.size)
        low = (lowest[entries].view(shape) - base).clamp(min=0)
        high = (highest[entries].view(shape) - base).clamp(min=0)
        bucket = (low + high + 1) // 2
        own.append(bucket.flatten())
        of_all.append(torch.where(tagged[entries].view(shape) < 0, len(firsts), bucket + base).flatten())
    return torch.cat(own), torch.cat(of_all)


def draw_samples(
    keys: Tensor, ranges: tuple[Ranges, ...], rows: int, settings: HyperSettings, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw each interval's samples; return their positions, buckets and log-weights, flat."""
    counters, firsts, sizes, weights = _strata(ranges, keys.device)
    drawn = draw_slots(seeds, counters, firsts, sizes).split([r.level.count * r.samples for r in ranges], 1)
    slots = [
        x.view(-1, r.level.count, r.samples).repeat(rows // len(seeds), 1, 1)
        for x, r in zip(drawn, ranges, strict=True)
    ]
    positions = [_of_level(keys, r, rows).gather(-1, x).flatten() for x, r in zip(slots, ranges, strict=True)]
    buckets = torch.cat([x.flatten() for x in slots]) // settings.bucket
    return torch.cat(positions), buckets.to(torch.int32), weights


@lru_cache(maxsize=64)  # within documents a step has many lengths
def _strata(ranges: tuple[Ranges, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return counters, first slots, sizes and log-weights of all strata.

    They follow from shapes, and are small: kept, so that a call need not launch what makes them.
    """
    with torch.inference_mode(False):  # a later call may save the weights for its backward
        return _strata_of(ranges, device)


def _strata_of(ranges: tuple[Ranges, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts, weights = [], []
    for r in ranges:
        intervals = torch.arange(r.level.count, device=device)
        counters, firsts, sizes = strata(r.level.number, intervals, r.level.size, r.samples)
        parts.append(torch.stack([counters, firsts.expand_as(counters), sizes.expand_as(counters)]).flatten(1))
        weights.append(sizes.float().log2())
    counters, firsts, sizes = torch.cat(parts, 1)
    return counters, firsts, sizes, torch.cat(weights)
