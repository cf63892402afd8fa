"""How many blocks patterns keep, without H n² masks where the form of the patterns allows."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from s2train.layouts.patterns import BandedPattern, Dense, DistancePattern, MaskPattern, Pattern

_MASK_ELEMENTS = 1 << 22  # of a mask that is looked at in one go


def kept_key_blocks(patterns: Iterable[Pattern], num_blocks: int) -> Tensor:
    """How many key blocks each query block keeps in at least one of the patterns: int64 [num_blocks]."""
    distinct = list(dict.fromkeys(patterns))
    for kind, count in ((BandedPattern, _count_bands), (DistancePattern, _count_distances), (MaskPattern, _count_bits)):
        if all(isinstance(pattern, kind) for pattern in distinct):
            return count(cast(list, distinct), num_blocks)
    if any(isinstance(pattern, Dense) for pattern in distinct):
        return torch.arange(1, num_blocks + 1)
    return _count_masks(distinct, num_blocks)


def _count_bands(patterns: Sequence[BandedPattern], num_blocks: int) -> Tensor:
    key = torch.arange(num_blocks)
    kept = torch.zeros(num_blocks, dtype=torch.int64)
    starts = sorted({0, *(limit for pattern in patterns for limit in pattern.limits if limit < num_blocks)})
    for start, stop in zip(starts, [*starts[1:], num_blocks], strict=True):
        columns = torch.zeros(num_blocks, dtype=torch.bool)
        for pattern in patterns:
            columns |= pattern.columns(bisect_right(pattern.limits, start), key)
        before = torch.cat([torch.zeros(1, dtype=torch.int64), columns.cumsum(0)])  # columns among the first j
        # Query block i has key blocks i - stop < j <= i - start in the band.
        kept += before[(key - start + 1).clamp(min=0)] - before[(key - stop + 1).clamp(min=0)]
    return kept


def _count_distances(patterns: Sequence[DistancePattern], num_blocks: int) -> Tensor:
    distance = torch.arange(num_blocks)
    kept = torch.zeros(num_blocks, dtype=torch.bool)
    for pattern in patterns:
        kept |= pattern.distances(distance)
    return kept.cumsum(0)


def _count_bits(patterns: Sequence[MaskPattern], num_blocks: int) -> Tensor:
    patterns[0].check_length(num_blocks)
    union = patterns[0].bits.clone()
    for pattern in patterns[1:]:
        pattern.check_length(num_blocks)
        rows = min(len(union), pattern.num_blocks)
        union = union[:rows, : pattern.bits.shape[1]] | pattern.bits[:rows, : union.shape[1]]
    mask = np.unpackbits(union[:num_blocks].numpy(), axis=1, count=num_blocks, bitorder="little")
    return torch.from_numpy(mask.sum(1, dtype=np.int64))


def _count_masks(patterns: Sequence[Pattern], num_blocks: int) -> Tensor:
    blocks = torch.arange(num_blocks)
    counts = []
    for query in blocks.split(max(1, _MASK_ELEMENTS // num_blocks)):
        union = torch.zeros(len(query), num_blocks, dtype=torch.bool)
        for pattern in patterns:
            union |= pattern.keep(query[:, None], blocks[None, :])
        counts.append(union.sum(1))
    return torch.cat(counts)
