"""Strictly causal lists of selected key blocks.

A list has the blocks that are always kept, and the best candidates.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.attention.selection.scorer import MASKED


@dataclass(frozen=True)
class Budget:
    """What a query block reads.

    Attributes:
        window: last blocks, always kept, with its own.
        sinks: first blocks, always kept.
        top_k: best candidates; None: `share` of them, rounded up.
    """

    window: int
    sinks: int
    top_k: int | None
    share: float | None

    def num_candidates(self, row: int) -> int:
        """Count the blocks that query block `row` chooses from."""
        return max(0, row - self.window - self.sinks + 1)

    def num_chosen(self, row: int) -> int:
        """Count the candidates that query block `row` reads."""
        count = self.num_candidates(row)
        return min(self.top_k, count) if self.top_k is not None else math.ceil((self.share or 0) * count)

    def num_kept(self, row: int) -> int:
        """Count the blocks that query block `row` reads."""
        return min(row + 1, self.window + self.sinks) + self.num_chosen(row)

    def most_chosen(self, rows: int) -> int:
        """Count the slots that candidates need, in lists of `rows` query blocks."""
        return max(1, self.num_chosen(rows - 1))

    def candidates(self, rows: Tensor, num_blocks: int) -> Tensor:
        """Mark the candidates of query blocks `rows` [...]: bool [..., num_blocks]."""
        block = torch.arange(num_blocks, device=rows.device)
        return (block >= self.sinks) & (block <= rows[..., None] - self.window)


def select(scores: Tensor, rows: Tensor, budget: Budget, slots: int) -> Tensor:
    """Select each query block's key blocks.

    The lists are int32 [b, h_kv, rows, sinks + slots + window], -1 where unused. The query block's own block is in the
    last slot. Of blocks with equal scores, the earlier one is preferred.

    Args:
        scores: [b, h_kv, rows, n_k].
        rows: int64 [1 or b, 1, rows], number of each query block; negative: none, and an empty list.
        slots: for candidates, as `Budget.most_chosen` of the last query block.
    """
    candidates = budget.candidates(rows, scores.shape[-1])
    ranked, block = scores.detach().masked_fill(~candidates, MASKED).sort(dim=-1, descending=True, stable=True)
    slots = min(slots, block.shape[-1])
    chosen = block[..., :slots].masked_fill(ranked[..., :slots] < MASKED / 2, -1)
    if budget.share is not None:
        count = (candidates.sum(-1, keepdim=True).double() * budget.share).ceil()
        chosen = chosen.masked_fill(torch.arange(slots, device=rows.device) >= count, -1)
    row = rows[..., None]
    sinks = torch.arange(budget.sinks, device=rows.device)
    first = torch.where(sinks <= row - budget.window, sinks, -1)
    last = (row - torch.arange(budget.window - 1, -1, -1, device=rows.device)).clamp_min(-1)
    shape = chosen.shape[:-1]
    parts = [first.expand(*shape, -1), chosen, last.expand(*shape, -1)]
    return torch.cat(parts, -1).int()


def listed(indices: Tensor, num_blocks: int) -> Tensor:
    """Mark the blocks of lists [..., slots]: bool [..., num_blocks]."""
    marks = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter_(-1, torch.where(indices < 0, num_blocks, indices).long(), True)[..., :num_blocks]
