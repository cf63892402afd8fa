"""Query blocks of a call, and checks of arguments for all statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_alike, check_groups
from ..layout import check_block_size
from ..spec import Format, shape_bhsd


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


def check_call(
    tensors: dict[str, Tensor],
    of_rows: dict[str, Tensor],
    format: Format,
    block_size: int,
    query_offset: int,
) -> None:
    """Check that a call's tensors fit together; raise ValueError on a mismatch.

    Args:
        tensors: q, k, and where the statistic reads them v and dout, in `format`.
        of_rows: one number for each query row of each head, [b, H, s_q].
    """
    check_alike(tensors, format)
    check_block_size(block_size)
    q = tensors["q"]
    b, heads, s_q, dim = shape_bhsd(q, format)
    b_k, kv_heads, s_k, dim_k = shape_bhsd(tensors["k"], format)
    if b_k != b or dim_k != dim or 0 in (b, heads, kv_heads, s_q, s_k, dim):
        raise ValueError(
            f"q {list(q.shape)} and k {list(tensors['k'].shape)} must share batch and head dimension in format "
            f"{format!r}, all sizes at least 1"
        )
    check_groups(heads, kv_heads)
    precise = torch.promote_types(q.dtype, torch.float32)
    for name, x in of_rows.items():
        if x.shape != (b, heads, s_q) or x.dtype != precise or x.device != q.device:
            raise ValueError(
                f"{name} must be {precise} {[b, heads, s_q]} on {q.device}, one number for each row of each head of q, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
    if query_offset < 0:
        raise ValueError(f"query_offset must be at least 0, got {query_offset}")
