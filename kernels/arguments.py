"""Check that arguments of the public operations fit together."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .bounds_cache import of_documents
from .spec import FORMATS, AttentionSpec, Format, shape_bhsd
from .topk_layout import Layout, TopKLayout

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scale_of(softmax_scale: float | None, dim: int) -> float:
    """Return the scale of the scores, by default 1 / sqrt(dim).

    Raises ValueError for a scale that can't be.
    """
    scale = 1 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    # a comparison instead of math.isfinite: torch.compile also traces it for a symbolic scale
    if not 0 < scale < math.inf:
        raise ValueError(f"softmax_scale must be finite and above 0, got {scale}")
    return scale


def check_triton_dtype(q: Tensor, names: str) -> None:
    """Check that Triton's kernels take q's dtype; ValueError if not.

    Args:
        names: the tensors to cast.
    """
    if q.dtype not in TRITON_DTYPES:
        raise ValueError(f"q is {q.dtype}: Triton's kernels take {TRITON_DTYPES}; cast {names}")


def check_alike(tensors: dict[str, Tensor], format: Format) -> None:
    """Check that tensors have four dimensions, and q's floating-point dtype and device.

    Raises ValueError for the first that hasn't.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    q = tensors["q"]
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions {format!r}, got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} but {name} is {x.dtype}: cast them to one dtype")
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {x.device}: move them to one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"{', '.join(tensors)} must be floating point, got {q.dtype}")


def check_groups(heads: int, kv_heads: int) -> None:
    """Check that query heads form groups, one for each KV head."""
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} KV heads of k: change one of them")


def check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: Layout, format: Format) -> None:
    """Check shapes, dtypes, devices and heads; raise ValueError on a mismatch."""
    check_alike({"q": q, "k": k, "v": v}, format)
    if layout.device != q.device:
        raise ValueError(f"q is on {q.device} but the layout on {layout.device}: use layout.to(q.device)")
    (b, heads, _, dim), (b_k, kv_heads, s_k, dim_k) = shape_bhsd(q, format), shape_bhsd(k, format)
    if shape_bhsd(v, format)[:3] != (b_k, kv_heads, s_k) or b_k != b or dim_k != dim or 0 in (dim, kv_heads):
        raise ValueError(
            f"shapes don't match in format {format!r}: q {list(q.shape)}, k {list(k.shape)}, "
            f"v {list(v.shape)}; q and k share batch and head dimension, k and v all but the head dimension"
        )
    check_groups(heads, kv_heads)
    if layout.batch_size not in (1, b):
        raise ValueError(
            f"the layout is for {layout.batch_size} sequences but q has {b}: build it for the batch"
            f"{'' if isinstance(layout, TopKLayout) else ', or without a batch axis'}"
        )
    if isinstance(layout, TopKLayout):
        _check_lists(layout, b, heads, kv_heads)
        return
    if layout.num_heads != heads:
        raise ValueError(
            f"the layout has {layout.num_heads} heads but q has {heads}: slice it with "
            "layout.heads(start, stop), or build it for these heads"
        )


def _check_lists(layout: TopKLayout, batch: int, heads: int, kv_heads: int) -> None:
    if layout.num_heads != heads or layout.num_lists not in (heads, kv_heads) or layout.batch_size != batch:
        raise ValueError(
            f"the TopKLayout has {layout.batch_size} x {layout.num_lists} lists for {layout.num_heads} heads; q, k and "
            f"v have {batch} sequences, {heads} heads and {kv_heads} KV heads: give each head, or each KV head, a list"
        )


def check_positions(q_shape: tuple[int, int, int, int], s_k: int, layout: Layout, spec: AttentionSpec) -> None:
    """Check offset, layout size and the shape of `cu_seqlens`.

    Raises ValueError on a mismatch; reads nothing from the device.
    """
    b, _, s_q, _ = q_shape
    if spec.query_offset < 0:
        raise ValueError(f"query_offset must be at least 0, got {spec.query_offset}")
    if spec.cu_seqlens is None:
        _check_lengths(layout, spec.query_offset + s_q, s_k)
        return
    if isinstance(layout, TopKLayout):
        raise ValueError(
            "cu_seqlens takes a BlockLayout, which restarts in every document; a TopKLayout lists key blocks of the "
            "whole sequence: list only the document's blocks, or pass one document per sequence"
        )
    bounds = spec.cu_seqlens
    if bounds.dim() != 1 or bounds.numel() < 2 or bounds.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 [documents + 1], got {bounds.dtype} {list(bounds.shape)}: "
            "pass the first row of each document and the total"
        )
    if bounds.device.type != layout.device.type:
        raise ValueError(f"cu_seqlens is on {bounds.device}, q on {layout.device}: move it there")
    if b != 1 or s_q != s_k or spec.query_offset != 0:
        raise ValueError(
            f"cu_seqlens needs batch 1, equal numbers of queries and keys and query_offset 0, got batch {b}, {s_q} "
            f"queries, {s_k} keys, query_offset {spec.query_offset}: pack all documents along the sequence"
        )


def check_values(layout: Layout, spec: AttentionSpec, s_q: int) -> None:
    """Check the values of `cu_seqlens` and of run-time indices.

    Raises ValueError on a CPU; on a GPU a device-side assertion fails.
    """
    bounds = spec.cu_seqlens
    if bounds is not None:
        check = partial(check_documents, bounds, s_q, layout)
        of_documents(layout.cache, "checked documents", bounds, s_q, check)
    if isinstance(layout, TopKLayout):
        layout.check_values()


def check_documents(bounds: Tensor, s_q: int, layout: Layout) -> None:
    """Check the values of `cu_seqlens`.

    Raises ValueError on a CPU. On a GPU, where reading them would stall, a device-side assertion fails.
    """
    lengths = bounds.diff()
    if bounds.device.type == "cpu":
        if bounds[0] != 0 or bounds[-1] != s_q or bool((lengths < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to the {s_q} rows of q, got {bounds.tolist()}")
        _check_lengths(layout, int(lengths.max()), int(lengths.max()))
        return
    room = layout.block_size * min(layout.num_query_blocks, layout.num_key_blocks)
    sound = (bounds[0] == 0) & (bounds[-1] == s_q) & ((lengths >= 0) & (lengths <= room)).all()
    torch._assert_async(sound, "cu_seqlens must ascend from 0 to q's rows, each document within the layout")


def _check_lengths(layout: Layout, end_of_queries: int, s_k: int) -> None:
    size = layout.block_size
    if end_of_queries > layout.num_query_blocks * size or s_k > layout.num_key_blocks * size:
        raise ValueError(
            f"the layout is too small: {layout.num_query_blocks} x {layout.num_key_blocks} blocks of {size} "
            f"hold {layout.num_query_blocks * size} query and {layout.num_key_blocks * size} key positions, "
            f"{end_of_queries} and {s_k} are needed: build it for at least "
            f"{-(-end_of_queries // size)} x {-(-s_k // size)} blocks"
        )
