"""Count the blocks that patterns keep together, without H n² masks.

Patterns of one form are united in that form.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from s2train.layouts.patterns import BandedPattern, Dense, DistancePattern, MaskPattern, Pattern, Span
from s2train.layouts.patterns.span import union_counts, widest

_MASK_ELEMENTS = 1 << 22  # mask elements evaluated at once


def kept_key_blocks(patterns: Iterable[Pattern], num_blocks: int) -> Tensor:
    """Count key blocks that any pattern keeps, per query block: int64 [num_blocks]."""
    distinct = list(dict.fromkeys(patterns))
    if any(isinstance(pattern, Dense) for pattern in distinct):
        return torch.arange(1, num_blocks + 1)
    unions = _unite(distinct, num_blocks)
    if len(unions) == 1:
        return unions[0].counts()
    counts = []
    for query in torch.arange(num_blocks).split(max(1, _MASK_ELEMENTS // num_blocks)):
        mask = unions[0].mask(query)
        for union in unions[1:]:
            mask |= union.mask(query)
        counts.append(mask.sum(1))
    return torch.cat(counts)


def touched_key_blocks(patterns: Iterable[Pattern], num_blocks: int, first: int, stop: int) -> Tensor:
    """Mark the key blocks that query blocks keep in any pattern.

    Args:
        first, stop: first query block, and one past the last.

    Returns:
        bool [num_blocks].
    """
    distinct = list(dict.fromkeys(patterns))
    if any(isinstance(pattern, Dense) for pattern in distinct):
        return torch.arange(num_blocks) < stop
    touched = torch.zeros(num_blocks, dtype=torch.bool)
    for union in _unite(distinct, num_blocks):
        touched |= union.touched(first, stop)
    return touched


def kept_positions(pattern: Pattern, block_size: int, seq_length: int) -> int:
    """Count the causal (query, key) token pairs that one head keeps.

    Diagonal blocks are triangular, and the last block may be partial.
    """
    num_blocks = -(-seq_length // block_size)
    blocks = torch.arange(num_blocks)
    rows = torch.full((num_blocks,), block_size)
    rows[-1] = seq_length - (num_blocks - 1) * block_size
    diagonal = pattern.keep(blocks, blocks).long()
    # Only the last block can be partial; as a key block it occurs only on the diagonal.
    before = (kept_key_blocks([pattern], num_blocks) - diagonal) * block_size
    return int((rows * before + diagonal * (rows * (rows + 1) // 2)).sum())


def kept_share(pattern: Pattern, block_size: int, seq_length: int) -> float:
    """Return the share of causal positions that a pattern keeps."""
    return kept_positions(pattern, block_size, seq_length) / (seq_length * (seq_length + 1) // 2)


class _Union(Protocol):
    """Union of patterns of one form over `num_blocks`."""

    def counts(self) -> Tensor:
        """Count key blocks that any pattern keeps, per query block: int64 [num_blocks]."""
        ...

    def mask(self, query: Tensor) -> Tensor:
        """Return the mask rows of query blocks: bool [len(query), num_blocks]."""
        ...

    def touched(self, first: int, stop: int) -> Tensor:
        """Mark the key blocks that these query blocks keep: [num_blocks]."""
        ...


def _touched_by_rows(union: "_Union", num_blocks: int, first: int, stop: int) -> Tensor:
    touched = torch.zeros(num_blocks, dtype=torch.bool)
    for query in torch.arange(first, stop).split(max(1, _MASK_ELEMENTS // num_blocks)):
        touched |= union.mask(query).any(0)
    return touched


def _unite(patterns: Sequence[Pattern], num_blocks: int) -> list[_Union]:
    banded = [pattern for pattern in patterns if isinstance(pattern, BandedPattern)]
    distances = [pattern for pattern in patterns if isinstance(pattern, DistancePattern)]
    masks = [pattern for pattern in patterns if isinstance(pattern, MaskPattern)]
    spans = [pattern for pattern in patterns if isinstance(pattern, Span)]
    others = [p for p in patterns if not isinstance(p, BandedPattern | DistancePattern | MaskPattern | Span)]
    unions: list[_Union] = []
    if banded:
        unions.append(_Bands(banded, num_blocks))
    if distances:
        unions.append(_Distances(distances, num_blocks))
    if masks:
        unions.append(_Bits(masks, num_blocks))
    if spans:
        unions.append(_Spans(spans, num_blocks))
    if others:
        unions.append(_Masks(others, num_blocks))
    return unions


class _Bands:
    """Union of banded patterns: columns between each two limits."""

    def __init__(self, patterns: Sequence[BandedPattern], num_blocks: int) -> None:
        self.key = torch.arange(num_blocks)
        starts = sorted({0, *(limit for pattern in patterns for limit in pattern.limits if limit < num_blocks)})
        self.bands: list[tuple[int, int, Tensor]] = []
        for start, stop in zip(starts, [*starts[1:], num_blocks], strict=True):
            columns = torch.zeros(num_blocks, dtype=torch.bool)
            for pattern in patterns:
                columns |= pattern.columns(bisect_right(pattern.limits, start), self.key)
            self.bands.append((start, stop, columns))

    def counts(self) -> Tensor:
        kept = torch.zeros_like(self.key)
        for start, stop, columns in self.bands:
            before = torch.cat([torch.zeros(1, dtype=torch.int64), columns.cumsum(0)])  # columns among the first j
            # Query block i has key blocks i - stop < j <= i - start in the band.
            kept += before[(self.key - start + 1).clamp(min=0)] - before[(self.key - stop + 1).clamp(min=0)]
        return kept

    def mask(self, query: Tensor) -> Tensor:
        mask = torch.zeros(len(query), len(self.key), dtype=torch.bool)
        for start, stop, columns in self.bands:
            mask |= columns & (query[:, None] >= self.key + start) & (query[:, None] < self.key + stop)
        return mask

    def touched(self, first: int, stop: int) -> Tensor:
        touched = torch.zeros(len(self.key), dtype=torch.bool)
        for begin, end, columns in self.bands:
            queries = torch.clamp(self.key + end, max=stop) - torch.clamp(self.key + begin, min=first)
            touched |= columns & (queries > 0)
        return touched


class _Distances:
    """Union of distance patterns: distances that any pattern keeps."""

    def __init__(self, patterns: Sequence[DistancePattern], num_blocks: int) -> None:
        self.key = torch.arange(num_blocks)
        self.kept = torch.zeros(num_blocks, dtype=torch.bool)
        for pattern in patterns:
            self.kept |= pattern.distances(self.key)

    def counts(self) -> Tensor:
        return self.kept.cumsum(0)

    def mask(self, query: Tensor) -> Tensor:
        distance = query[:, None] - self.key
        return self.kept[distance.clamp(min=0)] & (distance >= 0)

    def touched(self, first: int, stop: int) -> Tensor:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.kept.cumsum(0)])  # kept distances below d
        return before[(stop - self.key).clamp(min=0)] > before[(first - self.key).clamp(min=0)]


class _Bits:
    """Union as one bit mask."""

    def __init__(self, patterns: Sequence[MaskPattern], num_blocks: int) -> None:
        width = -(-num_blocks // 8)
        bits = np.zeros((num_blocks, width), dtype=np.uint8)
        for pattern in patterns:
            pattern.check_length(num_blocks)
            bits |= pattern.bits[:num_blocks, :width].numpy()
        self.bits, self.num_blocks = bits, num_blocks

    def counts(self) -> Tensor:
        return self.mask(torch.arange(self.num_blocks)).sum(1)

    def mask(self, query: Tensor) -> Tensor:
        rows = np.unpackbits(self.bits[query.numpy()], axis=1, count=self.num_blocks, bitorder="little")
        return torch.from_numpy(rows).bool()

    def touched(self, first: int, stop: int) -> Tensor:
        bits = np.bitwise_or.reduce(self.bits[first:stop], axis=0)
        of_any = torch.from_numpy(np.unpackbits(bits, count=self.num_blocks, bitorder="little")).bool()
        return of_any & (torch.arange(self.num_blocks) < stop)


class _Spans:
    """Union of spans: the widest window and the most sinks."""

    def __init__(self, patterns: Sequence[Span], num_blocks: int) -> None:
        self.patterns, self.key = list(patterns), torch.arange(num_blocks)
        self.window, self.sinks = widest(self.patterns, num_blocks), max(pattern.sinks for pattern in patterns)

    def counts(self) -> Tensor:
        return union_counts(self.patterns, len(self.key))

    def mask(self, query: Tensor) -> Tensor:
        query = query[:, None]
        return (query >= self.key) & ((query < self.key + self.window[query]) | (self.key < self.sinks))

    def touched(self, first: int, stop: int) -> Tensor:
        return _touched_by_rows(self, len(self.key), first, stop)


class _Masks:
    """Union of patterns of any other form, evaluated one by one."""

    def __init__(self, patterns: Sequence[Pattern], num_blocks: int) -> None:
        self.patterns, self.key = patterns, torch.arange(num_blocks)

    def counts(self) -> Tensor:
        rows = max(1, _MASK_ELEMENTS // len(self.key))
        return torch.cat([self.mask(query).sum(1) for query in self.key.split(rows)])

    def mask(self, query: Tensor) -> Tensor:
        mask = torch.zeros(len(query), len(self.key), dtype=torch.bool)
        for pattern in self.patterns:
            mask |= pattern.keep(query[:, None], self.key)
        return mask

    def touched(self, first: int, stop: int) -> Tensor:
        return _touched_by_rows(self, len(self.key), first, stop)
