"""Targets that scorers learn from, and losses against them.

A target is the true probability of key blocks.
"""

import torch
from torch import Tensor

from s2train.attention.selection.scorer import precise
from s2train.kernels.candidates import MASKED


def kl_divergence(scores: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Compute each row's KL divergence over candidates, weighted by their mass.

    The result [..., rows] is the sum over c of P_c (log P_c / sum P - log softmax(scores)_c). Rows without mass to
    place weigh nothing.

    Args:
        scores, target: [b, h_kv, rows, n_k]; targets are probabilities of blocks, which need not sum to 1.
        candidates: bool [1 or b, 1, rows, n_k].
    """
    mass = target * candidates
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    estimate = scores.masked_fill(~candidates, MASKED).log_softmax(-1)
    return (mass * (share.clamp_min(1e-9).log() - estimate)).masked_fill(~candidates, 0).sum(-1)


def squared_error(scores: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Compute each row's squared error of candidates' estimated probabilities: [..., rows]."""
    mass = target * candidates
    estimate = scores.masked_fill(~candidates, MASKED).softmax(-1) * mass.sum(-1, keepdim=True)
    return (estimate - mass).masked_fill(~candidates, 0).square().sum(-1)


LOSSES = {"kl": kl_divergence, "mse": squared_error}


def sampled_positions(length: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Draw `count` positions, one from each equal part of the sequence.

    The sequence is divided into `count` parts. Positions are int64, ascending. A token that lies in two parts may be
    drawn in both, so that all tokens are drawn equally often.
    """
    count = min(count, length)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    drawn = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    return ((torch.arange(count, device=device) + drawn) * (length / count)).long().clamp_max(length - 1)


_ELEMENTS = 1 << 27  # of the scores that `row_mass` holds at once: 512 MiB


def row_mass(query: Tensor, key: Tensor, positions: Tensor, block_size: int, scale: float) -> Tensor:
    """Compute the true probability of key blocks for single queries.

    The result, [b, h_kv, rows, n_k] without gradient, is the mean over a group's heads. The cost is rows x keys; KV
    heads are computed in parts, to bound the memory.

    Args:
        query: [rows, b, h, d], those at `positions`.
        key: [s, b, h_kv, d].
    """
    length, _, num_kv_heads, _ = key.shape
    at_once = max(1, _ELEMENTS * num_kv_heads // (query.shape[:3].numel() * length))
    hidden = torch.arange(length, device=key.device) > positions[:, None]
    queries = query.unflatten(2, (num_kv_heads, -1))
    with torch.no_grad():
        parts = [
            _row_mass(q.to(precise(q.dtype)), k.to(precise(k.dtype)), hidden, block_size, scale)
            for q, k in zip(queries.split(at_once, 2), key.split(at_once, 2), strict=True)
        ]
    return torch.cat(parts, 1)


def _row_mass(query: Tensor, key: Tensor, hidden: Tensor, block_size: int, scale: float) -> Tensor:
    """Compute `row_mass` of some KV heads: query [rows, b, h_kv, group, d]."""
    scores = torch.einsum("rbhgd,sbhd->bhgrs", query * scale, key)
    rows = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    if missing := -len(key) % block_size:
        rows = torch.nn.functional.pad(rows, (0, missing))  # copies, even if nothing is missing
    return rows.unflatten(-1, (-1, block_size)).sum(-1).mean(2)
