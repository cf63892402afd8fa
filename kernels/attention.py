"""Block-sparse attention with one layout per head: the public operation."""

from __future__ import annotations

import math
import os
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from .arguments import check_positions, check_tensors, check_values
from .custom_op import attend, layout_arguments
from .spec import AttentionSpec, Format, shape_bhsd
from .topk_layout import Layout

Backend = Literal["auto", "triton", "portable", "torch"]
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[False] = ..., backend: Backend = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, softmax_scale: float | None = ...,
    causal: bool = ..., query_offset: int = ..., cu_seqlens: Tensor | None = ..., format: Format = ...,
    return_lse: Literal[True], backend: Backend = ...,
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
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the (query block, key block) pairs that `layout` keeps for every head.

    Args:
        q: [s_q, b, H, d] in format "sbhd" ([b, s_q, H, d] in "bshd", [b, H, s_q, d] in "bhsd"); bfloat16,
            float16 or float32 (the torch backend takes float64 too), d up to 256, others than powers of two by
            padding. Read by its strides; only a strided last dimension is copied.
        k, v: [s_k, b, H_kv, d], [s_k, b, H_kv, d_v], q's dtype; d_v may differ from d. H is a multiple of H_kv: query
            head h reads KV head h // (H // H_kv), which is not expanded.
        layout: of H heads, on q's device, large enough for all positions. Heads of a group may keep different blocks,
            and so may sequences of a batch. A `BlockLayout` is made once; a `TopKLayout` is made of top-k indices on
            the device, anew in every step, and indices get no gradient.
        softmax_scale: above 0; default 1 / sqrt(d).
        causal: key positions after the query's are hidden, token by token, whatever the layout keeps.
        query_offset: position, in tokens, of q's first row; key row j has position j. It may exceed s_k.
        cu_seqlens: int32 [documents + 1], 0, ascending, s_q: documents packed along the sequence, on q's device.
            Positions, causality and layout restart in each. For b = 1, s_q = s_k, query_offset = 0 and a BlockLayout.
        return_lse: also return the natural log-sum-exp of the scaled scores, to merge results over ranges of keys.
        backend: see `resolve_backend`; `kernels_in_use` tells which kernels that means for given arguments.

    Returns:
        Output like q with d_v for d, contiguous; with `return_lse` also float32 [b, H, s_q] in every format (float64
        for float64). Both are differentiable, once. Rows that see no key have output 0, log-sum-exp -inf and zero
        gradients, whatever the gradient of their log-sum-exp.

    Precision: products in the inputs' dtype, summed in float32; float32 is never rounded to TF32, whatever
    ``torch.backends.cuda.matmul.allow_tf32`` says.

    Size: any number of elements (offsets have 64 bits) and of batch * H; fewer than 2**24 elements between the rows of
    a head, 2**31 programs in a launch and 2**31 kept tiles in a layout, else ValueError.

    Determinism: outputs are the same in every run. So are gradients under ``torch.use_deterministic_algorithms(True)``,
    and always on the portable kernels. Hopper's own backward (16 bits, d = d_v = 64 or 128) sums dq in whatever
    order its programs finish, so that its last bits differ from run to run; those sums take 4 * b * H * s_q * d bytes
    for the while.

    torch.compile: traced whole, as one operator (``fullgraph=True`` holds), also with return_lse, in training and with
    checkpointing. The graph holds a BlockLayout by a number: keep the layout until the last backward is done, else
    RuntimeError. BlockLayouts are made outside of compiled functions; a TopKLayout may be made inside, and its indices
    are an input like any other. Other lengths and layouts compile anew twice at most; from then on one graph serves
    all.

    CUDA graphs: forward and backward can be captured after one call of each with the same layout and shapes, which
    compiles the kernels and builds, from the device's answers, what the layout keeps for them. A TopKLayout is built
    within the graph, from what its indices hold at each replay.

    Checkpointing: ``torch.utils.checkpoint`` with ``use_reentrant=False``.

    Raises:
        ValueError: arguments that don't fit together, naming argument and remedy. Values of cu_seqlens and indices that
            don't fit on a CPU, in a compiled call when it runs; on a GPU, where reading them would stall it, a
            device-side assertion fails instead.
    """
    check_tensors(q, k, v, layout, format)
    resolved = resolve_backend(backend, q.device)
    if resolved != "torch" and q.dtype not in _TRITON_DTYPES:
        raise ValueError(f"q is {q.dtype}: the {resolved} backend takes {_TRITON_DTYPES}; cast q, k and v")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    spec = AttentionSpec(scale, causal, query_offset, cu_seqlens, format, portable=resolved == "portable")
    q_shape = shape_bhsd(q, format)
    check_positions(q_shape, shape_bhsd(k, format)[2], layout, spec)
    lse: Tensor | None
    if torch.compiler.is_compiling():
        out, lse = attend(
            q, k, v, cu_seqlens, *layout_arguments(layout), scale, causal, query_offset, format, resolved, return_lse
        )  # fmt: skip
    else:
        check_values(layout, spec, q_shape[2])
        if resolved == "torch":
            # imported here so that a process needs only the backend that it uses
            from .torch_backend import torch_attention

            out, lse = torch_attention(q, k, v, layout, spec, with_lse=return_lse)
        else:
            from .triton_backend import triton_attention

            out, lse = triton_attention(q, k, v, layout, spec)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def resolve_backend(backend: Backend, device: torch.device | str) -> Literal["triton", "portable", "torch"]:
    """The backend that runs: "auto" means triton on CUDA and torch on a CPU, and falls back to nothing else.

    - "triton": the fastest kernels there are for the arguments: Hopper's own where they can, else the portable ones.
    - "portable": the portable Triton kernels always, the same on every GPU.
    - "torch": dense masks in torch. On CUDA slow, and only when asked for by name.

    "triton" and "portable" on a CPU need Triton's interpreter (TRITON_INTERPRET=1 before the first import of triton),
    else ValueError.
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
