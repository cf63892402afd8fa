"""Triton kernels before and after the Hopper backward's main kernel.

For each query row, `prepare` computes delta and the log-sum-exp in base 2, and `finish` orders the accumulated dq.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import triton
import triton.language as tl

from ..fp_fusion import with_fp_fusion
from ..tiles import tile_of_document


@triton.jit
def _rows_of_tile(tiles, num_heads, s_q, first_tile, num_tiles, offset, PACKED: tl.constexpr):
    """Return the batch, head and 64 rows of a program.

    Returns batch * head, batch and head, in 64 bits, then the rows, and which of them exist.
    """
    program = tl.program_id(0)
    tile = program % num_tiles
    batch_head = (program // num_tiles).to(tl.int64)
    if PACKED:
        first, start, length = tile_of_document(tiles, tile, 64)
        position = first + tl.arange(0, 64)
        row, in_range = start + position, position < length
    else:
        row = (tile + first_tile) * 64 - offset + tl.arange(0, 64)
        in_range = (row >= 0) & (row < s_q)
    return batch_head, batch_head // num_heads, batch_head % num_heads, row.to(tl.int64), in_range


@with_fp_fusion
@triton.jit(do_not_specialize=["num_heads", "s_q", "first_tile", "num_tiles", "offset"])
def s2_attention_bwd_kernel_hopper_prepare(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, lse2_ptr, delta_ptr, tiles,
    out_batch, out_head, out_row, dout_batch, dout_head, dout_row, num_heads, s_q, first_tile, num_tiles, offset,
    D: tl.constexpr, HAS_DLSE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Prepare log-sum-exp in base 2 and delta of every query tile.

    The log-sum-exp is +inf for rows that do not exist or have no key.
    """
    batch_head, b, h, row, in_range = _rows_of_tile(tiles, num_heads, s_q, first_tile, num_tiles, offset, PACKED)
    dims = tl.arange(0, D)
    out_at = out_ptr + b * out_batch + h * out_head + row[:, None] * out_row + dims[None, :]
    dout_at = dout_ptr + b * dout_batch + h * dout_head + row[:, None] * dout_row + dims[None, :]
    out = tl.load(out_at, mask=in_range[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_at, mask=in_range[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    at = batch_head * s_q + row
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + at, mask=in_range, other=0.0)
    lse = tl.load(lse_ptr + at, mask=in_range, other=float("-inf"))
    empty = lse == float("-inf")
    to = tl.program_id(0).to(tl.int64) * 64 + tl.arange(0, 64)
    tl.store(lse2_ptr + to, tl.where(empty, float("inf"), lse * 1.4426950408889634))
    tl.store(delta_ptr + to, tl.where(empty, 0.0, delta))


@with_fp_fusion
@triton.jit(do_not_specialize=["num_heads", "s_q", "first_tile", "num_tiles", "offset"])
def s2_attention_bwd_kernel_hopper_finish(
    acc_ptr, dq_ptr, tiles, dq_batch, dq_head, dq_row, scale, num_heads, s_q, first_tile, num_tiles, offset,
    D: tl.constexpr, PACKED: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Convert accumulated dq to its final order and dtype.

    The sums are in the order of a warpgroup's registers (`_store_dq`), which has half of the head dimensions (two
    PIECES) or all of them (one).
    """
    HALF: tl.constexpr = D // PIECES
    _, b, h, row, in_range = _rows_of_tile(tiles, num_heads, s_q, first_tile, num_tiles, offset, PACKED)
    dq_base = dq_ptr + b * dq_batch + h * dq_head + row[:, None] * dq_row
    for c in tl.static_range(PIECES):
        at = (tl.program_id(0).to(tl.int64) * PIECES + c) * (64 * HALF)
        x = tl.load(acc_ptr + at + tl.arange(0, 64 * HALF)) * scale
        x = x.to(dq_ptr.dtype.element_ty)
        x = tl.permute(tl.reshape(x, [HALF // 8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
        x = tl.reshape(x, [64, HALF])
        tl.store(dq_base + (c * HALF + tl.arange(0, HALF))[None, :], x, mask=in_range[:, None])
