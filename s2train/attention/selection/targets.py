"""What scorers learn from: the true probability of key blocks, and losses against it."""

import torch
from torch import Tensor

from s2train.attention.selection.scorer import MASKED, precise


def kl_divergence(scores: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Compute each row's KL divergence over candidates, weighted by the mass that they have: [..., rows].

    sum over c of P_c (log P_c / sum P - log softmax(scores)_c). Rows without mass to place weigh nothing.

    Args:
        scores, target: [b, h_kv, rows, n_k]; targets are probabilities of blocks, which need not sum to 1.
        candidates: bool [1 or b, 1, rows, n_k].
    """
    mass = target * candidates
    share = mass / mass.sum(-1, keepdim=True).clamp_min(1e-9)
    estimate = scores.masked_fill(~candidates, MASKED).log_softmax(-1)
    return (mass * (share.clamp_min(1e-9).log() - estimate)).masked_fill(~candidates, 0).sum(-1)


def squared_error(scores: Tensor, target: Tensor, candidates: Tensor) -> Tensor:
    """Compute each row's squared error of the estimated probabilities of candidates: [..., rows]."""
    mass = target * candidates
    estimate = scores.masked_fill(~candidates, MASKED).softmax(-1) * mass.sum(-1, keepdim=True)
    return (estimate - mass).masked_fill(~candidates, 0).square().sum(-1)


LOSSES = {"kl": kl_divergence, "mse": squared_error}


def sampled_positions(length: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Draw `count` positions, one from each of as many equal parts of the sequence: int64, ascending."""
    count = min(count, length)
    generator = torch.Generator(device)
    generator.manual_seed(seed)
    drawn = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    return ((torch.arange(count, device=device) + drawn) * (length / count)).long().clamp_max(length - 1)


def row_mass(query: Tensor, key: Tensor, positions: Tensor, block_size: int, scale: float) -> Tensor:
    """Compute the true probability of key blocks for single queries: [b, h_kv, rows, n_k], without gradient.

    The mean over a group's heads. It costs rows x keys, one KV head after the other.

    Args:
        query: [rows, b, h, d], those at `positions`.
        key: [s, b, h_kv, d].
    """
    length, _, num_kv_heads, _ = key.shape
    num_blocks = -(-length // block_size)
    dtype, parts = precise(key.dtype), []
    hidden = torch.arange(length, device=key.device) > positions[:, None]
    with torch.no_grad():
        for head, own in enumerate(query.unflatten(2, (num_kv_heads, -1)).unbind(2)):
            scores = torch.einsum("rbgd,sbd->bgrs", own.to(dtype), key[:, :, head].to(dtype)) * scale
            rows = scores.masked_fill_(hidden, float("-inf")).softmax(-1).mean(1)
            padded = torch.nn.functional.pad(rows, (0, num_blocks * block_size - length))
            parts.append(padded.unflatten(-1, (num_blocks, block_size)).sum(-1))
    return torch.stack(parts, 1)
