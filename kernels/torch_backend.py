"""Block-sparse attention with dense masks in torch, for short sequences on CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import reference_attention
from .spec import AttentionSpec, from_bhsd, to_bhsd
from .token_mask import token_mask
from .topk_layout import Layout, TopKLayout

# masks cached with a layout: a few shapes that alternate (training, evaluation, context-parallel chunks), none huge
_CACHED_MASKS = 4
CACHED_BYTES = 64 * 2**20


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the log-sum-exp's dtype: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute output in `spec.format` and the log-sum-exp [b, h, s_q] in `lse_dtype`.

    The log-sum-exp is None unless requested.
    """
    if q.is_cuda or with_lse:
        # torch's fused attention returns no log-sum-exp, and on CUDA rows without keys are not 0
        precise = lse_dtype(q.dtype)
        out, lse = reference_attention(
            q.to(precise),
            k.to(precise),
            v.to(precise),
            layout,
            softmax_scale=spec.softmax_scale,
            causal=spec.causal,
            query_offset=spec.query_offset,
            cu_seqlens=spec.cu_seqlens,
            format=spec.format,
        )
        return out.to(q.dtype), lse
    qh, kh, vh = (to_bhsd(x, spec.format) for x in (q, k, v))
    bias = _bias(layout, qh.shape[2], kh.shape[2], spec, q.dtype)
    grouped = qh.shape[1] != kh.shape[1]
    out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=bias, scale=spec.softmax_scale, enable_gqa=grouped)
    return from_bhsd(out, spec.format).contiguous(), None


def torch_gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None, dlse: Tensor | None, layout: Layout, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute contiguous gradients of q, k and v.

    A gradient of None counts as 0. Uses the formulas of `backward.py`, for custom operators, where autograd can't be
    used.
    """
    precise = lse_dtype(q.dtype)
    qh, kh, vh = (to_bhsd(x, spec.format).to(precise) for x in (q, k, v))
    kv_heads, s_k = kh.shape[1:3]
    group = qh.shape[1] // kv_heads
    kh, vh = kh.repeat_interleave(group, 1), vh.repeat_interleave(group, 1)
    keep = token_mask(
        layout, qh.shape[2], s_k, causal=spec.causal, query_offset=spec.query_offset, cu_seqlens=spec.cu_seqlens
    )
    empty_rows = ~keep.any(-1, keepdim=True)
    scores = (qh @ kh.mT * spec.softmax_scale).masked_fill(~keep, -torch.inf)
    weights = scores.masked_fill(empty_rows, 0).softmax(-1).masked_fill(empty_rows, 0)
    dscores = torch.zeros_like(weights)
    dv = torch.zeros_like(vh)
    if dout is not None:
        dout = to_bhsd(dout, spec.format).to(precise)
        dweights = dout @ vh.mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dv = weights.mT @ dout
    if dlse is not None:
        dscores = dscores + weights * dlse.unsqueeze(-1).masked_fill(empty_rows, 0)
    dq, dk = (dscores @ kh) * spec.softmax_scale, (dscores.mT @ qh) * spec.softmax_scale
    dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
    dq, dk, dv = (from_bhsd(x, spec.format).to(q.dtype).contiguous() for x in (dq, dk, dv))
    return dq, dk, dv


def _bias(layout: Layout, s_q: int, s_k: int, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """Build the additive mask [1 or batch, H, s_q, s_k].

    It is 0 for visible keys and -inf for others. torch would convert a bool mask in every call.
    """
    key = ("bias", s_q, s_k, spec.causal, spec.query_offset, dtype)
    if isinstance(layout, TopKLayout):  # of one step: kept until its indices are written to
        return layout.built(key, lambda: _bias_of(layout, s_q, s_k, spec, dtype))
    if spec.cu_seqlens is None and key in layout.cache:
        return layout.cache[key]
    bias = _bias_of(layout, s_q, s_k, spec, dtype)
    if spec.cu_seqlens is None and bias.nbytes <= CACHED_BYTES:
        cached = [name for name in layout.cache if name[0] == "bias"]
        if len(cached) >= _CACHED_MASKS:
            del layout.cache[cached[0]]
        layout.cache[key] = bias
    return bias


def _bias_of(layout: Layout, s_q: int, s_k: int, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    keep = token_mask(layout, s_q, s_k, causal=spec.causal, query_offset=spec.query_offset, cu_seqlens=spec.cu_seqlens)
    keep = keep if keep.dim() == 4 else keep[None]
    with torch.inference_mode(False):  # a later call may save the mask for its backward
        return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
