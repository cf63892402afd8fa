"""References in plain torch: block-sparse attention, and splitting heads."""

import math

import torch
from torch import Tensor

from .spec import Format, from_bhsd, to_bhsd
from .token_mask import token_mask
from .topk_layout import Layout


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    format: Format = "sbhd",
) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp [b, h, s_q]; differentiable by autograd.

    The output has q's shape with v's head dimension. Arguments are those of `block_sparse_attention`. All arithmetic
    and both results are in q's dtype: float64 makes this the oracle. Memory is O(b * h * s_q * s_k). Rows without any
    visible key have output 0, log-sum-exp -inf and zero gradients.
    """
    qh, kh, vh = (to_bhsd(x, format) for x in (q, k, v))
    group = qh.shape[1] // kh.shape[1]
    kh, vh = kh.repeat_interleave(group, 1), vh.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(qh.shape[-1]) if softmax_scale is None else softmax_scale
    keep = token_mask(layout, qh.shape[2], kh.shape[2], causal=causal, query_offset=query_offset, cu_seqlens=cu_seqlens)
    empty_rows = ~keep.any(-1, keepdim=True)
    scores = (qh @ kh.mT * scale).masked_fill(~keep, -torch.inf)
    # the shift cancels, so it needs no gradient; a finite shift avoids inf - inf in empty rows
    shift = torch.where(empty_rows, 0, _largest(scores.detach()))
    weights = (scores - shift).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(empty_rows, 1)
    out = (weights / total) @ vh
    lse = (shift + total.log()).masked_fill(empty_rows, -torch.inf)
    return from_bhsd(out, format).contiguous(), lse.squeeze(-1)


def reference_split_heads(packed: Tensor, dim: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split a projection into rotated queries and keys, and values, as `split_heads`."""
    length, batch = packed.shape[:2]
    cos, sin = (x.view(length, batch, 1, -1) for x in (cos, sin))
    query, key, value = packed.split([packed.shape[-1] - 2 * dim, dim, dim], -1)

    def turn(x: Tensor) -> Tensor:
        first, second, rest = x.split([cos.shape[-1], cos.shape[-1], dim - 2 * cos.shape[-1]], -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)

    return turn(query.reshape(length, batch, -1, dim)), turn(key), value


def _largest(scores: Tensor) -> Tensor:
    """Return row maxima [..., 1]; -inf without keys, where `amax` would raise."""
    if scores.shape[-1] == 0:
        return scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    return scores.amax(-1, keepdim=True)
