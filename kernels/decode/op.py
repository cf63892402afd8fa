"""Public operations: decode with block-sparse attention over paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_triton_dtype, scale_of
from ..attention import Backend, resolve_backend
from ..layout import BlockLayout
from .pages import write_token
from .reference import reference_decode


def block_sparse_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    layout: BlockLayout | None,
    *,
    softmax_scale: float | None = None,
    num_splits: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute attention of one new token per sequence over its kept pages.

    Args:
        q: [b, H, d]; bfloat16, float16 or float32 (the torch backend also takes float64).
        keys, values: [pages + 1, B, d] and [pages + 1, B, d_v], contiguous. A page holds key block j of one KV head of
            one sequence. The last page is never read.
        table: int32 [b, H_kv, n_blocks], the last dimension contiguous: the page of each key block, or -1 if the block
            is not kept. H is a multiple of H_kv: query head h reads KV head h // (H // H_kv).
        positions: int32 [b]: position of each query, whose own key and value are already in the pages
            (`append_token`); below n_blocks * B and within the layout. At -1 a sequence has no query: its output is 0
            and its log-sum-exp -inf.
        layout: for H heads in blocks of B, on q's device; None keeps every block up to the query's. Positions after the
            query and blocks without a page are masked, whatever the layout keeps.
        softmax_scale: above 0; default 1 / sqrt(d).
        num_splits: number of parts that the keys are split into, 1 to 128; by default enough to fill the device.
        backend: as in `block_sparse_attention`.

    Returns:
        Output [b, H, d_v] in q's dtype and natural log-sum-exp float32 [b, H] (float64 for float64), without gradients.
        Sums accumulate in float32, in the same order in every run with the same shapes.

    On CUDA the host reads nothing, except that the first call with a layout builds its schedule and waits for the
    device. A call can be captured in a CUDA graph and replayed with other tensor contents.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy. Positions are checked
            only on a CPU.
    """
    _check_pages(keys, values, table, positions)
    _check(q, keys, table, positions, layout)
    scale = scale_of(softmax_scale, q.shape[-1])
    if num_splits is not None and not 1 <= num_splits <= 128:
        raise ValueError(f"num_splits must be 1 to 128, got {num_splits}")
    with torch.no_grad():
        if resolve_backend(backend, q.device) == "torch":
            precise = torch.promote_types(q.dtype, torch.float32)
            out, lse = reference_decode(q.to(precise), keys, values, table, positions, layout, scale)
            return out.to(q.dtype), lse
        # imported here so that a process loads only the backend that it uses
        from .kernels import triton_decode

        check_triton_dtype(q, "q, keys and values")
        return triton_decode(q, keys, values, table, positions, layout, scale, num_splits)


def append_token(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor, *, backend: Backend = "auto"
) -> None:
    """Write each sequence's new token into the page of its block.

    A token whose block has no page is dropped.

    Args:
        k, v: [b, H_kv, d] and [b, H_kv, d_v], in the pages' dtype.
        keys, values, table, positions: as in `block_sparse_decode`; a sequence at position -1 writes nothing.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy.
    """
    _check_pages(keys, values, table, positions)
    for name, x, pages in (("k", k, keys), ("v", v, values)):
        if x.shape != (*table.shape[:2], pages.shape[2]) or x.dtype != pages.dtype:
            raise ValueError(
                f"{name} must be {pages.dtype} {[*table.shape[:2], pages.shape[2]]}, got {x.dtype} {list(x.shape)}"
            )
    with torch.no_grad():
        if resolve_backend(backend, k.device) == "torch":
            write_token(keys, table, k, positions)
            write_token(values, table, v, positions)
        else:
            from .kernels import triton_append

            triton_append(k, v, keys, values, table, positions)


def _check_pages(keys: Tensor, values: Tensor, table: Tensor, positions: Tensor) -> None:
    if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2] or keys.dtype != values.dtype:
        raise ValueError(
            "keys and values must be [pages + 1, block, d] and [pages + 1, block, d_v] of one dtype, got "
            f"{keys.dtype} {list(keys.shape)} and {values.dtype} {list(values.shape)}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("keys and values must be contiguous: allocate the pages as one tensor each")
    if table.dim() != 3 or table.dtype != torch.int32 or table.stride(2) != 1:
        raise ValueError(
            "table must be int32 [b, KV heads, blocks] with a contiguous last dimension, got "
            f"{table.dtype} {list(table.shape)}"
        )
    if positions.shape != table.shape[:1] or positions.dtype != torch.int32:
        raise ValueError(
            f"positions must be int32 [{table.shape[0]}], one per sequence of the table, got "
            f"{positions.dtype} {list(positions.shape)}"
        )
    for name, x in (("values", values), ("table", table), ("positions", positions)):
        if x.device != keys.device:
            raise ValueError(f"keys are on {keys.device} but {name} on {x.device}: move them to one device")


def _check(q: Tensor, keys: Tensor, table: Tensor, positions: Tensor, layout: BlockLayout | None) -> None:
    batch, num_kv_heads, num_blocks = table.shape
    if q.dim() != 3 or q.shape[0] != batch or q.shape[2] != keys.shape[2] or q.dtype != keys.dtype:
        raise ValueError(
            f"q must be {keys.dtype} [{batch}, heads, {keys.shape[2]}] to match table and keys, got "
            f"{q.dtype} {list(q.shape)}"
        )
    if q.device != keys.device:
        raise ValueError(f"q is on {q.device} but keys on {keys.device}: move them to one device")
    if num_kv_heads == 0 or q.shape[1] % num_kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the table's {num_kv_heads} KV heads")
    room = num_blocks * keys.shape[1]
    if layout is not None:
        if layout.num_heads != q.shape[1] or layout.block_size != keys.shape[1] or layout.device != q.device:
            raise ValueError(
                f"the layout has {layout.num_heads} heads in blocks of {layout.block_size} on {layout.device}, but q "
                f"has {q.shape[1]} heads on {q.device} and pages hold {keys.shape[1]}: build it for these"
            )
        room = min(room, layout.num_query_blocks * layout.block_size)
    if (
        positions.device.type == "cpu"
        and positions.numel()
        and not -1 <= int(positions.min()) <= int(positions.max()) < room
    ):
        raise ValueError(f"positions must be -1 or below the {room} of table and layout, got {positions.tolist()}")
