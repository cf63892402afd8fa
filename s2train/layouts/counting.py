"""How many blocks patterns keep, without H n² masks where the form of the patterns allows."""

from collections.abc import Iterable

import torch
from torch import Tensor

from s2train.layouts.patterns import ColumnPattern, Pattern

_MASK_ELEMENTS = 1 << 22  # of a mask that is looked at in one go


def kept_key_blocks(patterns: Iterable[Pattern], num_blocks: int) -> Tensor:
    """How many key blocks each query block keeps in at least one of the patterns: int64 [num_blocks]."""
    distinct = list(dict.fromkeys(patterns))
    key = torch.arange(num_blocks)
    columns = torch.zeros(num_blocks, dtype=torch.bool)
    local = 0
    for pattern in distinct:
        if not isinstance(pattern, ColumnPattern):
            return _count_masks(distinct, num_blocks)
        columns |= pattern.columns(key)
        local = max(local, pattern.local)
    # Query block i keeps the columns up to it, and what else is in the window i - local < j <= i.
    others = (~columns).cumsum(0)
    in_window = others.clone()
    in_window[local:] -= others[: max(num_blocks - local, 0)]
    return columns.cumsum(0) + in_window


def _count_masks(patterns: list[Pattern], num_blocks: int) -> Tensor:
    blocks = torch.arange(num_blocks)
    counts = []
    for query in blocks.split(max(1, _MASK_ELEMENTS // num_blocks)):
        union = torch.zeros(len(query), num_blocks, dtype=torch.bool)
        for pattern in patterns:
            union |= pattern.keep(query[:, None], blocks[None, :])
        counts.append(union.sum(1))
    return torch.cat(counts)
