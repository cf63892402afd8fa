"""Reference HyperAttention: a softmax with weights in plain torch.

out_i = sum_j w_ij exp(s_ij) v_j / sum_j w_ij exp(s_ij). The weights w are constants: 1 for exact keys and the query's
buckets, a stratum's size for sampled keys, 0 for others. So autograd's gradients are those of the function computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..spec import Format, from_bhsd, to_bhsd
from .hashing import hash_ranks, sample_slots
from .settings import HyperSettings, levels

Ranks = tuple[Tensor, Tensor]


def reference_hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: HyperSettings,
    projection_seeds: Tensor,
    sample_seeds: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    format: Format = "sbhd",
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp [b, H, n]; differentiable by autograd.

    Arguments are those of `hyper_attention`. All arithmetic is in q's dtype: float64 makes this the oracle. Memory is
    O(b * H * n * n).

    Args:
        ranks: hashes of queries [b, H, n] and keys [b, H_kv, n], to compare dtypes on the same buckets; by default
            those of q and k.
    """
    qh, kh, vh = (to_bhsd(x, format) for x in (q, k, v))
    if ranks is None:
        ranks = hash_ranks(qh, kh, projection_seeds, settings.projections)
    group = qh.shape[1] // kh.shape[1]
    weights = key_weights(*ranks, settings, sample_seeds, causal)
    scale = 1 / math.sqrt(qh.shape[-1]) if softmax_scale is None else softmax_scale
    scores = qh @ kh.repeat_interleave(group, 1).mT * scale + weights.log().to(q.dtype)
    lse = scores.logsumexp(-1)
    out = scores.softmax(-1) @ vh.repeat_interleave(group, 1)
    return from_bhsd(out, format).contiguous(), lse


def exact_keys(settings: HyperSettings, length: int, causal: bool, device: torch.device) -> Tensor:
    """Return which keys a query always reads, bool [n, n].

    These are its own interval, window and sinks.
    """
    at = torch.arange(length, device=device)
    query, key = at[:, None], at[None, :]
    distance = query // settings.block - key // settings.block
    exact = key < settings.sinks
    if causal:
        exact = exact | (distance <= settings.window // settings.block)
        exact = exact | (query // settings.shortest == key // settings.shortest)
        return exact & (key <= query)
    if length <= settings.shortest:
        return torch.ones_like(distance, dtype=torch.bool)
    if settings.window:
        exact = exact | (distance.abs() <= settings.window // settings.block)
    return exact.expand(length, length)


@torch.no_grad()
def key_weights(q_ranks: Tensor, k_ranks: Tensor, settings: HyperSettings, seeds: Tensor, causal: bool) -> Tensor:
    """Compute keys' weights for queries, float64 [b, H, n, n]."""
    batch, heads, length = q_ranks.shape
    kv_heads = k_ranks.shape[1]
    weights = torch.zeros(batch, kv_heads, heads // kv_heads, length, length, dtype=torch.float64, device=seeds.device)
    of_queries = q_ranks.view(batch, kv_heads, heads // kv_heads, length)
    for level in levels(settings, length, causal):
        for interval in range(level.count):
            start, (first, stop) = level.start(interval), level.readers(interval, length)
            ranks, order = k_ranks[..., start : start + level.size].sort(dim=-1, stable=True)
            own = _bucket(ranks, of_queries[..., first:stop].flatten(2), settings.bucket)
            own = own.view(batch, kv_heads, -1, stop - first, 1)
            slots, sizes = sample_slots(seeds, level.number, interval, level.size, settings.samples)
            of_slot = torch.zeros(kv_heads, level.size, dtype=torch.float64, device=seeds.device)
            of_slot.scatter_(1, slots, sizes.double().expand_as(slots))
            bucket_of_slot = torch.arange(level.size, device=seeds.device) // settings.bucket
            in_order = torch.where(bucket_of_slot == own, 1.0, of_slot[:, None, None])
            slot = order.argsort(-1)[:, :, None, None].expand_as(in_order)
            weights[..., first:stop, start : start + level.size] = in_order.gather(-1, slot)
    exact = exact_keys(settings, length, causal, seeds.device)
    return torch.where(exact, 1.0, weights).flatten(1, 2)


def _bucket(sorted_ranks: Tensor, ranks: Tensor, bucket: int) -> Tensor:
    """Return each rank's bucket, the middle one of those holding it.

    Buckets are distinguished by their first ranks, as a search over few numbers.
    """
    firsts = sorted_ranks[..., ::bucket].contiguous()
    ranks = ranks.contiguous()
    lowest = (torch.searchsorted(firsts, ranks) - 1).clamp(min=0)
    highest = (torch.searchsorted(firsts, ranks, right=True) - 1).clamp(min=0)
    return (lowest + highest + 1) // 2
