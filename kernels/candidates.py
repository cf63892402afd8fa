"""Candidates of a selection: which key blocks they are, and their scores."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

MASKED = -1e30  # score of a block that is no candidate: finite, so that a row without candidates has gradients


def combine_heads(scores: Tensor, candidates: Tensor, normalize: bool) -> Tensor:
    """Combine the scores of a group's heads: [b, h_kv, rows, n_k].

    The result is their log-sum-exp. Values of blocks that are no candidates have no meaning. Heads are added one at a
    time, with less than half the memory traffic of `logsumexp`.

    Args:
        scores: [b, h_kv, group, rows, n_k].
        candidates: bool [1 or b, 1, rows, n_k].
        normalize: turn each head's scores to log-probabilities over the candidates first.
    """
    if normalize:
        scores = scores.masked_fill(~candidates[:, :, None], MASKED).log_softmax(-1)
    return reduce(torch.logaddexp, scores.unbind(2))


def mark_candidates(rows: Tensor, num_blocks: int, window: int, sinks: int) -> Tensor:
    """Mark the candidates of query blocks `rows` [...]: bool [..., num_blocks]."""
    block = torch.arange(num_blocks, device=rows.device)
    return (block >= sinks) & (block <= rows[..., None] - window)
