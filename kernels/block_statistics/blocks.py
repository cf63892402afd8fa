"""Query blocks of a call, and checks of arguments for all statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import check_block_size
from ..spec import FORMATS, Format, shape_bhsd

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def query_blocks(s_q: int, query_offset: int, block_size: int) -> tuple[int, int]:
    """Return a call's first query block and its number of query blocks."""
    first = query_offset // block_size
    return first, -(-(query_offset + s_q) // block_size) - first


def block_of_row(s_q: int, query_offset: int, block_size: int, device: torch.device) -> Tensor:
    """Return each row's query block, counted from the call's first: int64 [s_q]."""
    position = torch.arange(s_q, device=device) + query_offset
    return position // block_size - query_offset // block_size


def rows_of_block(s_q: int, query_offset: int, block_size: int, device: torch.device) -> Tensor:
    """Count the call's rows in each query block: int64 [n_q]."""
    first, count = query_blocks(s_q, query_offset, block_size)
    start = (torch.arange(count, device=device) + first) * block_size
    return (start + block_size).clamp(max=query_offset + s_q) - start.clamp(min=query_offset)


def scale_of(softmax_scale: float | None, dim: int) -> float:
    """Return the scale of the scores, by default 1 / sqrt(dim)."""
    return 1 / math.sqrt(dim) if softmax_scale is None else softmax_scale


def check_call(
    tensors: dict[str, Tensor],
    of_rows: dict[str, Tensor],
    format: Format,
    block_size: int,
    softmax_scale: float | None,
    query_offset: int,
) -> None:
    """Check that a call's tensors fit together; raise ValueError on a mismatch.

    Args:
        tensors: q, k, and where the statistic reads them v and dout, in `format`.
        of_rows: one number for each query row of each head, [b, H, s_q].
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}")
    check_block_size(block_size)
    q = tensors["q"]
    for name, x in tensors.items():
        if x.dim() != 4:
            raise ValueError(f"{name} must have the four dimensions {format!r}, got shape {list(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"q is {q.dtype} but {name} is {x.dtype}: cast them to one dtype")
    for name, x in (tensors | of_rows).items():
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} on {x.device}: move them to one device")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point, got {q.dtype}")
    b, heads, s_q, dim = shape_bhsd(q, format)
    b_k, kv_heads, s_k, dim_k = shape_bhsd(tensors["k"], format)
    if b_k != b or dim_k != dim or 0 in (b, heads, kv_heads, s_q, s_k, dim):
        raise ValueError(
            f"q {list(q.shape)} and k {list(tensors['k'].shape)} must share batch and head dimension in format "
            f"{format!r}, all sizes at least 1"
        )
    if heads % kv_heads != 0:
        raise ValueError(f"q has {heads} heads, not a multiple of the {kv_heads} KV heads of k: change one of them")
    precise = torch.promote_types(q.dtype, torch.float32)
    for name, x in of_rows.items():
        if x.shape != (b, heads, s_q) or x.dtype != precise:
            raise ValueError(
                f"{name} must be {precise} {[b, heads, s_q]}, one number for each row of each head of q, got "
                f"{x.dtype} {list(x.shape)}"
            )
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be finite and above 0, got {softmax_scale}")
    if query_offset < 0:
        raise ValueError(f"query_offset must be at least 0, got {query_offset}")
