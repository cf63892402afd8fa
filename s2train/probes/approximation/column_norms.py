"""Measures the column norms of attention matrices, which HyperAttention's theory assumes small.

HyperAttention (arXiv 2310.05869) assumes that α = n · max_j ‖A e_j‖² grows slower than n, A being the matrix of
attention probabilities of n tokens. In causal models the first tokens often have heavy columns: sinks are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# α / n by n, as published for ChatGLM2-6B-32k.
PUBLISHED = {
    1000: 0.0917, 2000: 0.0638, 3000: 0.0540, 4000: 0.0482, 5000: 0.0456, 6000: 0.0413, 7000: 0.0392, 8000: 0.0369,
    9000: 0.0360,
}  # fmt: skip
LEFT_OUT = 32  # columns, of the variant without the heaviest
_ROWS = 256  # of the matrix, in memory at once


@dataclass(frozen=True)
class Columns:
    """Largest squared column norms of one layer's attention matrices.

    The statistics are over its heads and sequences.

    Attributes:
        length: n, the tokens of a sequence.
        mean, largest: α / n.
        mean_of_rest: mean α / n without each matrix's `LEFT_OUT` heaviest columns.
    """

    layer: int
    length: int
    mean: float
    largest: float
    mean_of_rest: float


def squared_column_norms(query: Tensor, key: Tensor, scale: float, lengths: Sequence[int]) -> list[Tensor]:
    """Compute squared column norms of causal attention at several lengths.

    One pass computes all lengths. A shorter length takes the sequence's beginning.

    Args:
        query: [s, b, h, d]; key: [s, b, h_kv, d].
        lengths: ascending, none above s.
    Returns:
        fp32 [b, h, n] for each length n.
    """
    length, batch, heads, _ = query.shape
    group = heads // key.shape[2]
    keys = key.repeat_interleave(group, dim=2).permute(1, 2, 3, 0).float()
    sums = torch.zeros(batch, heads, length, device=query.device)
    found, wanted = [], list(lengths)
    bounds = sorted({*range(0, wanted[-1], _ROWS), *wanted})
    for begin, end in pairwise(bounds):
        rows = query[begin:end].permute(1, 2, 0, 3).float()
        scores = rows @ keys[..., :end] * scale
        later = torch.arange(end, device=query.device) > torch.arange(begin, end, device=query.device)[:, None]
        sums[..., :end] += scores.masked_fill(later, float("-inf")).softmax(-1).square().sum(-2)
        if end in wanted:
            found.append(sums[..., :end].clone())
    return found


def columns(layer: int, length: int, norms: Tensor) -> Columns:
    """Summarise squared column norms [b, h, n]."""
    rest = norms.topk(min(LEFT_OUT + 1, norms.shape[-1]), dim=-1).values[..., -1]
    largest = norms.amax(-1)
    return Columns(layer, length, float(largest.mean()), float(largest.max()), float(rest.mean()))
