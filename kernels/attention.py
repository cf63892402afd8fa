"""Public operation: block-sparse attention with one layout per head."""

from __future__ import annotations

import os
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from .arguments import check_positions, check_tensors, check_triton_dtype, check_values, scale_of
from .call import Call, keep
from .custom_op import attend, layout_arguments
from .layout import BlockLayout
from .spec import AttentionSpec, Format, shape_bhsd
from .topk_layout import Layout

Backend = Literal["auto", "triton", "portable", "torch"]


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[False] = ..., backend: Backend = ..., split_columns: bool = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[True], backend: Backend = ..., split_columns: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
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
    return_lse: bool = False,
    backend: Backend = "auto",
    split_columns: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute softmax(scale * q k^T) v over a layout's block pairs.

    `layout` keeps (query block, key block) pairs for every head; all other pairs are masked.

    Args:
        q: [s_q, b, H, d] in format "sbhd" ([b, s_q, H, d] in "bshd", [b, H, s_q, d] in "bhsd"). The dtype is bfloat16,
            float16 or float32; the torch backend also takes float64. d is at most 256 and is padded to a power of two.
            Strided tensors are read in place; only a strided last dimension is copied.
        k, v: [s_k, b, H_kv, d] and [s_k, b, H_kv, d_v], in q's dtype; d_v may differ from d. H is a multiple of H_kv:
            query head h reads KV head h // (H // H_kv), which is not expanded.
        layout: for H heads, on q's device, large enough for all positions. Query heads that share a KV head may keep
            different blocks, and so may sequences of a batch. A `BlockLayout` is built once. A `TopKLayout` is built
            from top-k indices on the device in every step; the indices get no gradient.
        softmax_scale: above 0; default 1 / sqrt(d).
        causal: mask keys after the query's position, token by token, whatever the layout keeps.
        query_offset: position, in tokens, of q's first row; key row j has position j. It may exceed s_k.
        cu_seqlens: int32 [documents + 1], ascending from 0 to s_q, on q's device: documents packed along the sequence.
            Positions, causality and layout restart in each document. Requires b = 1, s_q = s_k, query_offset = 0 and
            a BlockLayout. Tiles are kept for calls with the same tensor: for other documents pass another one, or
            change it by torch's operators, which count changes (not through NumPy, `.data`, a collective or a graph).
        return_lse: also return the natural log-sum-exp of the scaled scores, to merge results over ranges of keys.
        backend: see `resolve_backend`; `kernels_in_use` returns the kernels that a call runs.
        split_columns: let several programs compute dk and dv of a key block that many queries keep. Results are as
            deterministic as without. It takes up to 350 KB of device memory for each multiprocessor (at d = 128), and
            changes nothing where no block is kept that often, nor with cu_seqlens.

    Returns:
        Output with q's shape and d_v in place of d, contiguous. With `return_lse` also the log-sum-exp, float32
        [b, H, s_q] in every format (float64 for float64). Both are differentiable once. Rows without any visible key
        have output 0, log-sum-exp -inf and zero gradients, whatever the gradient of their log-sum-exp.

    Precision: matrix products take the inputs' dtype and accumulate in float32. float32 is never rounded to TF32,
    whatever ``torch.backends.cuda.matmul.allow_tf32`` is set to.

    Size: tensors may have any number of elements (offsets have 64 bits), and batch * H has no limit. ValueError unless
    rows of a head are fewer than 2**24 elements apart, a launch has fewer than 2**31 programs and a layout fewer than
    2**31 kept tiles.

    Determinism: outputs are the same in every run. Gradients are the same under
    ``torch.use_deterministic_algorithms(True)``, and always with the portable kernels. The Hopper backward (16-bit
    dtypes, d = d_v = 64 or 128) accumulates dq in the order in which its programs finish, so its last bits differ
    between runs; the accumulator takes 4 * b * H * s_q * d bytes during the backward pass.

    torch.compile: the call is traced as one operator (``fullgraph=True`` works), also with return_lse, in training and
    with checkpointing. The graph refers to a BlockLayout by a number: keep the layout alive until the last backward
    pass is done, else RuntimeError. Build BlockLayouts outside of compiled functions. A TopKLayout may be built inside;
    its indices are an ordinary input. New lengths and layouts recompile at most twice; then one graph serves all.

    CUDA graphs: forward and backward can be captured after one call of each with the same layout and shapes. That call
    compiles the kernels and, with data read from the device, builds what the layout caches for them. A TopKLayout is
    built within the graph, from the indices at each replay.

    Checkpointing: ``torch.utils.checkpoint`` with ``use_reentrant=False``. Hooks on saved tensors may return other
    strides, but no other shape, dtype or device: that is an error in the backward.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy. On a CPU, invalid
            values of cu_seqlens and indices raise it too, in a compiled call when it runs. On a GPU, where reading them
            would stall it, a device-side assertion fails instead.
    """
    settings = (softmax_scale, causal, query_offset, cu_seqlens, format, backend, split_columns)
    lse: Tensor | None
    if torch.compiler.is_compiling():
        call = _checked(q, k, v, layout, *settings)
        out, lse = attend(
            q, k, v, cu_seqlens, *layout_arguments(layout), call.spec.softmax_scale, causal, query_offset, format,
            call.backend, return_lse, split_columns,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    call = _found_or_checked(q, k, v, layout, *settings)
    if call.backend == "torch":
        # imported here so that a process loads only the backend that it uses
        from .torch_backend import torch_attention

        out, lse = torch_attention(q, k, v, layout, call.spec, with_lse=return_lse)
    else:
        from .triton_backend import triton_attention

        out, lse = triton_attention(q, k, v, layout, call)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _found_or_checked(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, softmax_scale: float | None, causal: bool, query_offset: int,
    cu_seqlens: Tensor | None, format: Format, backend: Backend, split_columns: bool,
) -> Call:  # fmt: skip
    """Return the earlier call like this one, else check the arguments."""
    calls, key = None, None
    if cu_seqlens is None and isinstance(layout, BlockLayout):
        calls = layout.calls
        key = (
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
            q.device, k.device, v.device, softmax_scale, causal, query_offset, format, backend, split_columns,
        )  # fmt: skip
        found = calls.get(key)
        if found is not None:
            found.found_again = True
            return found
    call = _checked(
        q, k, v, layout, softmax_scale, causal, query_offset, cu_seqlens, format, backend, split_columns
    )  # fmt: skip
    check_values(layout, call.spec, shape_bhsd(q, format)[2])
    if calls is not None:
        keep(calls, key, call)
    return call


def _checked(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, softmax_scale: float | None, causal: bool, query_offset: int,
    cu_seqlens: Tensor | None, format: Format, backend: Backend, split_columns: bool,
) -> Call:  # fmt: skip
    """Check the arguments' shapes, types and settings."""
    check_tensors(q, k, v, layout, format)
    resolved = resolve_backend(backend, q.device)
    if resolved != "torch":
        check_triton_dtype(q, "q, k and v")
    scale = scale_of(softmax_scale, q.shape[-1])
    spec = AttentionSpec(scale, causal, query_offset, cu_seqlens, format, resolved == "portable", split_columns)
    check_positions(shape_bhsd(q, format), shape_bhsd(k, format)[2], layout, spec)
    return Call(spec, resolved)


def resolve_backend(backend: Backend, device: torch.device | str) -> Literal["triton", "portable", "torch"]:
    """Return the backend that runs on a device.

    - "auto": triton on CUDA, torch on a CPU; there is no other fallback.
    - "triton": the fastest kernels that take the arguments: Hopper's where possible, else the portable ones.
    - "portable": always the portable Triton kernels, the same on every GPU.
    - "torch": dense masks in torch; slow on CUDA, where it must be requested by name.

    Raises:
        ValueError: "triton" or "portable" on a CPU without Triton's interpreter (TRITON_INTERPRET=1 before the first
            import of triton), an unknown backend, or another sort of device.
    """
    kind = torch.device(device).type
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"tensors must be on CUDA or a CPU, got {kind}")
    if backend == "auto":
        return "triton" if kind == "cuda" else "torch"
    if backend != "torch" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} runs on a CPU only in Triton's interpreter, for tests: set TRITON_INTERPRET=1 "
            "before Python starts, or use backend='torch'"
        )
    return backend
