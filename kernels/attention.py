"""Block-sparse attention with one layout per head: the public operation."""

from __future__ import annotations

import math
import os
from typing import Literal, overload

import torch
from torch import Tensor

from .layout import BlockLayout
from .spec import FORMATS, AttentionSpec, Format, shape_bhsd

Backend = Literal["auto", "triton", "torch"]
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[True], backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    format: Format = "sbhd",
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the (query block, key block) pairs that `layout` keeps for every head.

    Args:
        q: [s_q, b, H, d] in format "sbhd" ([b, s_q, H, d] in "bshd", [b, H, s_q, d] in "bhsd"); bfloat16,
            float16 or float32 (the torch backend takes float64 too). Any strides; a strided last dimension is
            copied.
        k, v: [s_k, b, H_kv, d], [s_k, b, H_kv, d_v]; H a multiple of H_kv: query head h reads KV head
            h // (H // H_kv).
        layout: of H heads, on q's device, large enough for all positions.
        softmax_scale: above 0; default 1 / sqrt(d).
        causal: key positions after the query's are hidden, token by token, whatever the layout keeps.
        query_offset: position of q's first row; key row j has position j. It may exceed s_k.
        cu_seqlens: int32 [documents + 1], 0, ascending, s_q: documents packed along the sequence. Positions,
            causality and layout restart in each. For b = 1, s_q = s_k and query_offset = 0. Bad values raise
            ValueError on a CPU; on a GPU, where reading them would stall it, a device-side assertion fails.
        return_lse: also return the natural log-sum-exp of the scaled scores.
        backend: see `resolve_backend`.

    Returns:
        Output like q with d_v for d, contiguous; with `return_lse` also float32 [b, H, s_q] in every format.
        Both are differentiable, once. Rows that see no key have output 0, log-sum-exp -inf, zero gradients.

    Outputs are the same in every run. So are gradients under ``torch.use_deterministic_algorithms(True)``, and always
    on the portable kernels; Hopper's own backward (16 bits, d = d_v 64 or 128) sums dq in whatever order its programs
    finish, so that its last bits differ from run to run. Those sums take 4 * b * H * s_q * d bytes for the while.

    Raises:
        ValueError: arguments that don't fit together, naming argument and remedy.
    """
    _check(q, k, v, layout, format)
    spec = AttentionSpec(
        softmax_scale=1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale,
        causal=causal,
        query_offset=query_offset,
        cu_seqlens=cu_seqlens,
        format=format,
    )
    _check_positions(shape_bhsd(q, format), shape_bhsd(k, format)[2], layout, spec)
    if resolve_backend(backend, q.device) == "torch":
        # imported here so that a process needs only the backend that it uses
        from .torch_backend import torch_attention

        out, lse = torch_attention(q, k, v, layout, spec, with_lse=return_lse)
    else:
        from .triton_backend import triton_attention

        if q.dtype not in _TRITON_DTYPES:
            raise ValueError(f"q is {q.dtype}: the triton backend takes {_TRITON_DTYPES}; cast q, k and v")
        out, lse = triton_attention(q, k, v, layout, spec)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def resolve_backend(backend: Backend, device: torch.device | str) -> Literal["triton", "torch"]:
    """The backend that runs: "auto" means triton on CUDA and torch on a CPU, and falls back to nothing else.

    "torch" on CUDA computes with dense masks, slowly, when asked for by name. "triton" on a CPU needs
    Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton), else ValueError.
    """
    kind = torch.device(device).type
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}')
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"tensors must be on CUDA or a CPU, got {kind}")
    if backend == "auto":
        return "triton" if kind == "cuda" else "torch"
    if backend == "triton" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend='triton' runs on a CPU only in Triton's interpreter, for tests: set TRITON_INTERPRET=1 "
            "before Python starts, or use backend='torch'"
        )
    return backend


def _check(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, format: Format) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions {format!r}, got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} but {name} is {x.dtype}: cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {x.device}: move them to one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q, k and v must be floating point, got {q.dtype}")
    if layout.device != q.device:
        raise ValueError(f"q is on {q.device} but the layout on {layout.device}: use layout.to(q.device)")
    (b, heads, _, dim), (b_k, kv_heads, s_k, dim_k) = shape_bhsd(q, format), shape_bhsd(k, format)
    if shape_bhsd(v, format)[:3] != (b_k, kv_heads, s_k) or b_k != b or dim_k != dim or 0 in (dim, kv_heads):
        raise ValueError(
            f"shapes don't match in format {format!r}: q {list(q.shape)}, k {list(k.shape)}, "
            f"v {list(v.shape)}; q and k share batch and head dimension, k and v all but the head dimension"
        )
    if heads % kv_heads != 0:
        raise ValueError(f"q has {heads} heads, no multiple of the {kv_heads} KV heads of k: change one of them")
    if layout.num_heads != heads:
        raise ValueError(
            f"the layout has {layout.num_heads} heads but q has {heads}: slice it with "
            "layout.heads(start, stop), or build it for these heads"
        )


def _check_positions(q_shape: tuple[int, int, int, int], s_k: int, layout: BlockLayout, spec: AttentionSpec) -> None:
    b, _, s_q, _ = q_shape
    if not (spec.softmax_scale > 0 and math.isfinite(spec.softmax_scale)):
        raise ValueError(f"softmax_scale must be finite and above 0, got {spec.softmax_scale}")
    if spec.query_offset < 0:
        raise ValueError(f"query_offset must be at least 0, got {spec.query_offset}")
    if spec.cu_seqlens is None:
        _check_lengths(layout, spec.query_offset + s_q, s_k)
        return
    bounds = spec.cu_seqlens
    if bounds.dim() != 1 or bounds.numel() < 2 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 [documents + 1], got {bounds.dtype} {list(bounds.shape)}: "
            "pass the documents' first rows and the total"
        )
    if bounds.device.type != layout.device.type:
        raise ValueError(f"cu_seqlens is on {bounds.device}, q on {layout.device}: move it there")
    if b != 1 or s_q != s_k or spec.query_offset != 0:
        raise ValueError(
            f"cu_seqlens needs batch 1, as many queries as keys and query_offset 0, got batch {b}, {s_q} "
            f"queries, {s_k} keys, query_offset {spec.query_offset}: pack all documents along the sequence"
        )
    lengths = bounds.diff()
    if bounds.device.type == "cpu":
        if bounds[0] != 0 or bounds[-1] != s_q or bool((lengths < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {s_q} rows of q, got {bounds.tolist()}")
        _check_lengths(layout, int(lengths.max()), int(lengths.max()))
        return
    room = layout.block_size * min(layout.num_query_blocks, layout.num_key_blocks)
    sound = (bounds[0] == 0) & (bounds[-1] == s_q) & ((lengths >= 0) & (lengths <= room)).all()
    torch._assert_async(sound, "cu_seqlens must ascend from 0 to q's rows, each document within the layout")


def _check_lengths(layout: BlockLayout, end_of_queries: int, s_k: int) -> None:
    size = layout.block_size
    if end_of_queries > layout.num_query_blocks * size or s_k > layout.num_key_blocks * size:
        raise ValueError(
            f"the layout is too small: {layout.num_query_blocks} x {layout.num_key_blocks} blocks of {size} "
            f"hold {layout.num_query_blocks * size} query and {layout.num_key_blocks * size} key positions, "
            f"{end_of_queries} and {s_k} are needed: build it for at least "
            f"{-(-end_of_queries // size)} x {-(-s_k // size)} blocks"
        )
