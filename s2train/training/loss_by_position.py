"""Computes held-out loss by position in the sequence.

The losses show whether a model uses distant context.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.megatron.context_parallel.all_gather import own_rows

_OCTAVES = 8


def position_edges(seq_length: int) -> list[int]:
    """Edges of position ranges that double in length.

    0, S/128, S/64, … S/2, S tokens, rounded down; fewer if S is below 128.
    """
    return sorted({0, *(seq_length >> power for power in range(_OCTAVES))})


def position_bins(edges: list[int], cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    """Range index of each position of a context parallel rank.

    int64 [s / cp], in the rank's order.
    """
    positions = torch.arange(edges[-1], device=device)
    own = own_rows(positions, cp_rank, cp_size) if cp_size > 1 else positions
    return torch.bucketize(own, torch.tensor(edges[1:], device=device), right=True)


def sum_by_position(losses: Tensor, weights: Tensor, bins: Tensor, count: int) -> Tensor:
    """Sum losses and weights over each range of positions.

    Args:
        losses, weights: float [b, s / cp].
        bins: range index of each position, from `position_bins`; below `count`.
    Returns:
        float64 [count, 2].
    """
    both = torch.stack([losses.double() * weights, weights.double()], dim=-1).sum(dim=0)  # [s / cp, 2]
    return both.new_zeros(count, 2).index_add_(0, bins, both)


@dataclass(frozen=True)
class HeldOut:
    """Losses of a held-out set, in nats per token.

    A loss is None if no token was counted or the loss is not finite.

    Attributes:
        loss: mean over all positions.
        by_position: [first position, one past the last, loss] of each range.
        short, long: mean over the first eighth and over the last half of the positions.
    """

    loss: float
    by_position: list[tuple[int, int, float | None]]
    short: float | None
    long: float | None

    @classmethod
    def of(cls, edges: list[int], sums: Tensor) -> "HeldOut":
        """Build from `sums`: float64 [ranges, 2], loss and tokens between `edges`."""
        total, tokens = sums.sum(dim=0).tolist()
        ranges = list(itertools.pairwise(edges))
        length = edges[-1]
        return cls(
            total / tokens if tokens else math.nan,
            [(start, stop, _mean(part)) for (start, stop), part in zip(ranges, sums, strict=True)],
            _mean(sums[[stop <= length >> 3 for _, stop in ranges]].sum(dim=0)),
            _mean(sums[[start >= length >> 1 for start, _ in ranges]].sum(dim=0)),
        )


def _mean(part: Tensor) -> float | None:
    total, tokens = part.tolist()
    return total / tokens if tokens and math.isfinite(total) else None
