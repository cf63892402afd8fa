"""Dense causal attention by the kernels of torch or FlashAttention-4.

The query range ends with the key range.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flash4 import fa4_attention

# cuDNN's is the fastest of torch's on Hopper (1.7 times FlashAttention-2); torch's default order tries it last.
_CUDA_ORDER = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def dense_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float,
    query_offset: int = 0,
    implementation: str = "auto",
) -> torch.Tensor:
    """Compute causal attention of every head over all earlier keys.

    A query also sees the key at its own position.

    Args:
        q: [s_q, b, h, d]; row i is at position `query_offset` + i.
        k, v: [s_k, b, h_kv, d], starting at position 0; h is a multiple of h_kv.
        softmax_scale: factor of the scores.
        query_offset: s_k − s_q: the last query is at the last key's position.
        implementation: kernels to use on a GPU: fa4 (FlashAttention-4), one of torch's (cudnn, flash for
            FlashAttention-2, efficient), or auto, the first of torch's that takes the tensors. A CPU has only one.
    Returns:
        [s_q, b, h, d].
    Raises:
        ValueError: the query range does not end with the key range, or the implementation is unknown.
    """
    s_q, s_k = q.shape[0], k.shape[0]
    if implementation not in ("auto", "fa4", *_CUDA_ORDER):
        raise ValueError(f"implementation={implementation!r} must be one of auto, fa4, {', '.join(_CUDA_ORDER)}")
    if query_offset != s_k - s_q:
        raise ValueError(
            f"query_offset={query_offset} must be s_k - s_q = {s_k - s_q}: give the keys up to the last query"
        )
    if implementation == "fa4":
        deterministic = torch.are_deterministic_algorithms_enabled()
        return fa4_attention(q, k, v, softmax_scale=softmax_scale, deterministic=deterministic)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # torch's only fused fp32 kernel needs equal numbers of KV and query heads.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    mask: torch.Tensor | None = None
    if 1 < s_q < s_k:
        from torch.nn.attention.bias import causal_lower_right  # imports dynamo: slow

        # torch recognises this object and keeps using a fused kernel; only a CPU needs an explicit mask.
        bias = causal_lower_right(s_q, s_k)
        mask = bias if q.is_cuda else bias._materialize(q.device)
    order = list(_CUDA_ORDER.values()) if implementation == "auto" else [_CUDA_ORDER[implementation]]
    with sdpa_kernel(order, set_priority=True) if q.is_cuda else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=s_q == s_k, scale=softmax_scale, enable_gqa=True
        )
    return out.permute(2, 0, 1, 3)


def torch_unsupported_reason(implementation: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Return why one of torch's kernels rejects a call, or None.

    The kernels are cudnn, flash and efficient. The answer is for this GPU. Arguments are those of
    `dense_causal_attention`.
    """
    if q.dtype == torch.float32:
        return None if implementation == "efficient" else "float32"
    if implementation == "cudnn" and torch.are_deterministic_algorithms_enabled():
        return "it has no deterministic backward"
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    params = SDPAParams(q, k, v, None, 0.0, q.shape[2] == k.shape[2], q.shape[1] != k.shape[1])
    usable = {"cudnn": can_use_cudnn_attention, "flash": can_use_flash_attention}.get(
        implementation, can_use_efficient_attention
    )
    return None if usable(params) else "torch doesn't take these tensors"
