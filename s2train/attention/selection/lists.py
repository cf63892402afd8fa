"""Strictly causal lists of selected key blocks.

A list has the blocks that are always kept, and the best candidates.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.kernels.attention import Backend
from s2train.kernels.candidates import mark_candidates
from s2train.kernels.select_blocks import select_blocks

_CHUNK_ROWS = 256  # at 1,024 key blocks 34 MB of scores of 32 heads


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
        return mark_candidates(rows, num_blocks, self.window, self.sinks)

    def counts(self, rows: Tensor) -> Tensor:
        """Count the candidates that query blocks `rows` read: int32, as `num_chosen`."""
        candidates = (rows - (self.window + self.sinks - 1)).clamp_min(0)
        if self.top_k is not None:
            return candidates.clamp_max(self.top_k).int()
        return (candidates.double() * (self.share or 0)).ceil().int()


def row_chunks(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield first and end of chunks of query blocks [first, end).

    A chunk is scored against the key blocks before its end, not against later ones. Its scores stay in a GPU's cache
    until they are read.
    """
    for start in range(first, end, _CHUNK_ROWS):
        yield start, min(start + _CHUNK_ROWS, end)


def select(
    scores: Tensor, rows: Tensor, budget: Budget, slots: int, *, normalize: bool = False, backend: Backend = "auto"
) -> Tensor:
    """Select each query block's key blocks.

    The lists are int32 [b, h_kv, rows, sinks + slots + window], as `select_blocks` returns them.

    Args:
        scores: [b, h_kv, group, rows, n_k], of `Scorer.head_scores`.
        rows: int64 [1 or b, 1, rows], number of each query block; negative: none, and an empty list.
        slots: for candidates, as `Budget.most_chosen` of the last query block.
        normalize: `Scorer.normalizes`.
    """
    rows = rows[:, 0]
    return select_blocks(
        scores, rows, budget.counts(rows), window=budget.window, sinks=budget.sinks, slots=slots,
        normalize=normalize, backend=backend,
    )  # fmt: skip


def listed(indices: Tensor, num_blocks: int) -> Tensor:
    """Mark the blocks of lists [..., slots]: bool [..., num_blocks]."""
    marks = torch.zeros(*indices.shape[:-1], num_blocks + 1, dtype=torch.bool, device=indices.device)
    return marks.scatter_(-1, torch.where(indices < 0, num_blocks, indices).long(), True)[..., :num_blocks]
