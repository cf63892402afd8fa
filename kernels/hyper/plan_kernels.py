"""Make the plan with Triton: few launches for all levels.

Each function returns what its namesake in `plan.py` does.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp_fusion import with_fp_fusion
from .device import interval_of, level_of
from .ranges import Ranges, tag_dtype
from .settings import HyperSettings

_ENTRIES = 1024


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "num_levels", "rows", "length"])
def s2_hyper_tag_kernel(
    ranks, tagged, num_tiles, num_levels, rows, length,
    BITS: tl.constexpr, ROWS: tl.constexpr, SHORTEST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Write keys' hashes with their interval's number in front."""
    program = tl.program_id(0)
    first = program % num_tiles * ROWS
    row = (program // num_tiles).to(tl.int64)
    position = first + tl.arange(0, ROWS)
    rank = tl.load(ranks + row * length + position, mask=position < length, other=0)
    key_base = row * 0
    interval_base = row * 0
    for level in range(0, num_levels):
        size, count, period, _, _ = level_of(level, length, 1, SHORTEST, CAUSAL)
        interval, second = interval_of(first, size, period, CAUSAL)
        taken = (position < length) & (interval < count)
        if CAUSAL:
            taken = taken & (second == 0)
        number = interval_base + row * count + interval
        at = key_base + (row * count + interval) * size + position - interval * period
        tag = (number << BITS) + rank
        tl.store(tagged + at, tag.to(tagged.dtype.element_ty), mask=taken)
        key_base += rows.to(tl.int64) * count * size
        interval_base += rows.to(tl.int64) * count


@triton.jit
def _count_below(firsts, base, buckets, tag, STEPS: tl.constexpr, EQUAL: tl.constexpr):
    """Count ascending firsts below each tag, or up to it."""
    low = tl.zeros(tag.shape, tl.int32)
    high = low + buckets
    for _ in range(0, STEPS):
        middle = (low + high) // 2
        value = tl.load(firsts + base + middle, mask=low < high, other=0)
        below = value <= tag if EQUAL else value < tag
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low <= middle) & (middle < high), middle, high)
    return low


@with_fp_fusion
@triton.jit(do_not_specialize=["num_tiles", "num_levels", "rows", "length"])
def s2_hyper_search_kernel(
    ranks, firsts, own_buckets, of_all, num_tiles, num_levels, rows, group, length,
    BITS: tl.constexpr, BUCKET: tl.constexpr, STEPS: tl.constexpr,
    ROWS: tl.constexpr, SHORTEST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Find a query tile's buckets at each level."""
    program = tl.program_id(0)
    first = program % num_tiles * ROWS
    batch_head = (program // num_tiles).to(tl.int64)
    row = batch_head // group
    position = first + tl.arange(0, ROWS)
    rank = tl.load(ranks + batch_head * length + position, mask=position < length, other=0)
    query_base = row * 0
    interval_base = row * 0
    bucket_base = row * 0
    for level in range(0, num_levels):
        size, count, period, shift, _ = level_of(level, length, 1, SHORTEST, CAUSAL)
        buckets = (size + BUCKET - 1) // BUCKET
        interval, reads = interval_of(first, size, period, CAUSAL)
        if reads > 0:
            number = row * count + interval
            tag = ((interval_base + number) << BITS) + rank
            base = bucket_base + number * buckets
            lowest = tl.maximum(_count_below(firsts, base, buckets, tag, STEPS, False) - 1, 0)
            highest = tl.maximum(_count_below(firsts, base, buckets, tag, STEPS, True) - 1, 0)
            bucket = (lowest + highest + 1) // 2
            at = query_base + (batch_head * count + interval) * size + position - interval * period - shift
            tl.store(own_buckets + at, bucket, mask=position < length)
            tl.store(of_all + at, (base + bucket).to(tl.int32), mask=position < length)
        query_base += rows.to(tl.int64) * group * count * size
        interval_base += rows.to(tl.int64) * count
        bucket_base += rows.to(tl.int64) * count * buckets


@with_fp_fusion
@triton.jit(do_not_specialize=["entries", "num_levels", "rows", "length"])
def s2_hyper_locate_kernel(
    where_ptr, found_ptr, entries, num_levels, rows, members, length,
    READERS: tl.constexpr, ROWS: tl.constexpr, SHORTEST: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Turn entries' numbers into member * length + position."""
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    where = tl.load(where_ptr + at, mask=at < entries, other=0)
    found = tl.zeros([ROWS], tl.int32)
    base = tl.program_id(0).to(tl.int64) * 0
    for level in range(0, num_levels):
        size, count, period, shift, _ = level_of(level, length, 1, SHORTEST, CAUSAL)
        inside = (where - base).to(tl.int32)
        interval = inside // size
        position = inside % size + interval % count * period
        if READERS:
            position += shift
        member = interval // count % members
        found = tl.where(where >= base, member * length + position, found)
        base += rows.to(tl.int64) * members * count * size
    tl.store(found_ptr + at, found, mask=at < entries)


def sort_keys(
    k_ranks: Tensor, ranges: tuple[Ranges, ...], settings: HyperSettings, causal: bool
) -> tuple[Tensor, Tensor]:
    """Sort keys by hash within each interval, in one sort over all."""
    batch, kv_heads, length = k_ranks.shape
    rows, last = batch * kv_heads, ranges[-1].level
    dtype = tag_dtype(ranges, rows, settings)
    entries = ranges[-1].key_base + rows * last.count * last.size
    tagged = torch.empty(entries, dtype=dtype, device=k_ranks.device)
    tile = min(settings.shortest, _ENTRIES)
    num_tiles = -(-length // tile)
    with torch.cuda.device_of(k_ranks):
        s2_hyper_tag_kernel[(rows * num_tiles,)](
            k_ranks, tagged, num_tiles, len(ranges), rows, length,
            BITS=settings.projections, ROWS=tile, SHORTEST=settings.shortest, CAUSAL=causal,
        )  # fmt: skip
    ordered, where = tagged.sort(stable=True)
    return ordered, _located(where, ranges, rows, 1, length, settings, causal, readers=False)


def find_buckets(
    q_ranks: Tensor, ordered: Tensor, ranges: tuple[Ranges, ...], settings: HyperSettings, rows: int, causal: bool
) -> tuple[Tensor, Tensor, int]:
    """Find each query's bucket at each level."""
    batch, heads, length = q_ranks.shape
    last = ranges[-1]
    firsts = torch.cat([x[:, :: settings.bucket].flatten() for x in _intervals(ordered, ranges, rows)])
    entries = last.query_base + batch * heads * last.level.count * last.level.size
    own = torch.empty(entries, dtype=torch.int32, device=q_ranks.device)
    of_all = torch.full((entries,), len(firsts), dtype=torch.int32, device=q_ranks.device)
    tile = min(settings.shortest, _ENTRIES)
    num_tiles = -(-length // tile)
    with torch.cuda.device_of(q_ranks):
        s2_hyper_search_kernel[(batch * heads * num_tiles,)](
            q_ranks, firsts, own, of_all, num_tiles, len(ranges), rows, batch * heads // rows, length,
            BITS=settings.projections, BUCKET=settings.bucket, STEPS=last.buckets.bit_length(),
            ROWS=tile, SHORTEST=settings.shortest, CAUSAL=causal,
        )  # fmt: skip
    return own, of_all, len(firsts)


def sort_queries(
    of_all: Tensor, num_buckets: int, ranges: tuple[Ranges, ...], length: int, rows: int, group: int,
    settings: HyperSettings, causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sort queries by bucket; return them, and where each bucket's begin."""
    by_bucket, where = of_all.sort(stable=True)
    every = torch.arange(num_buckets + 1, dtype=torch.int32, device=where.device)
    starts = torch.searchsorted(by_bucket, every, out_int32=True)
    return _located(where, ranges, rows, group, length, settings, causal, readers=True), starts


def _located(
    where: Tensor, ranges: tuple[Ranges, ...], rows: int, members: int, length: int, settings: HyperSettings,
    causal: bool, *, readers: bool,
) -> Tensor:  # fmt: skip
    found = torch.empty(where.shape, dtype=torch.int32, device=where.device)
    with torch.cuda.device_of(where):
        s2_hyper_locate_kernel[(-(-len(where) // _ENTRIES),)](
            where, found, len(where), len(ranges), rows, members, length,
            READERS=readers, ROWS=_ENTRIES, SHORTEST=settings.shortest, CAUSAL=causal,
        )  # fmt: skip
    return found


def _intervals(ordered: Tensor, ranges: tuple[Ranges, ...], rows: int) -> list[Tensor]:
    """Return each level's sorted hashes, [rows * intervals, size]."""
    sizes = [rows * r.level.count * r.level.size for r in ranges]
    return [x.view(-1, r.level.size) for x, r in zip(ordered.split(sizes), ranges, strict=True)]
