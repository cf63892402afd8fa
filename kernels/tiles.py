"""Device functions that the Triton kernels share: tiles, layout searches, packed documents."""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: float = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
# a tile has at most 128 rows: 32-bit offsets from its 64-bit base address reach all of it
_MAX_ROW_STRIDE = 2**24


@triton.jit
def load_tile(
    base, start, stride, in_range,
    ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load rows [start, start + ROWS) of a matrix, zero where masked.

    The matrix is [rows, DIM], the tile [ROWS, PADDED_DIM].
    """
    dims = tl.arange(0, PADDED_DIM)
    # the 64-bit product is one scalar per tile; the offsets within are the same for all tiles
    pointers = base + start.to(tl.int64) * stride
    pointers = pointers + tl.arange(0, ROWS)[:, None] * stride + dims[None, :]
    if MASK_ROWS:
        if DIM < PADDED_DIM:
            return tl.load(pointers, mask=in_range[:, None] & (dims < DIM)[None, :], other=0.0)
        return tl.load(pointers, mask=in_range[:, None], other=0.0)
    if DIM < PADDED_DIM:
        return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_lse(pointers, in_range, MASK: tl.constexpr = True):
    """Load log-sum-exps in base 2.

    Rows out of range or without keys get +inf, which makes all their weights 0.
    """
    lse = tl.load(pointers, mask=in_range, other=float("-inf")) if MASK else tl.load(pointers)
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


@triton.jit
def store_tile(
    base, start, stride, in_range, values, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):  # fmt: skip
    """Store the in-range rows of `values`, cast to the pointer's type.

    `values` is [ROWS, PADDED_DIM].
    """
    dims = tl.arange(0, PADDED_DIM)
    pointers = base + start.to(tl.int64) * stride
    pointers = pointers + tl.arange(0, ROWS)[:, None] * stride + dims[None, :]
    mask = in_range[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def count_below(indices, begin, end, low, high, CHUNK: tl.constexpr):
    """Count the ascending indices[begin:end] below `low` and below `high`."""
    below_low = begin * 0
    below_high = begin * 0
    for chunk in range(begin, end, CHUNK):
        at = chunk + tl.arange(0, CHUNK)
        index = tl.load(indices + at, mask=at < end, other=2147483647)
        below_low += tl.sum((index < low).to(tl.int32), 0)
        below_high += tl.sum((index < high).to(tl.int32), 0)
    return below_low, below_high


@triton.jit
def tile_of_document(tiles, tile, ROWS: tl.constexpr):
    """Locate a tile of a packed document.

    Returns its first position, and the document's first row and length.
    """
    entry = tiles + 3 * tile.to(tl.int64)
    start = tl.load(entry)
    length = tl.load(entry + 1)
    first = tl.load(entry + 2) * ROWS
    return first, start, length


def document_tiles(cu_seqlens: Tensor, num_rows: int, rows_per_tile: int) -> Tensor:
    """Compute each tile's document start, length and tile index, int32 [tiles, 3].

    The tile index counts within the document. The size depends only on shapes, so that the host need not wait; surplus
    tiles have length 0.
    """
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds.diff()
    ends = ((lengths + rows_per_tile - 1) // rows_per_tile).cumsum(0)
    tile = torch.arange(num_rows // rows_per_tile + lengths.numel(), device=bounds.device)
    document = torch.searchsorted(ends, tile, right=True)
    surplus = document == lengths.numel()
    document = document.clamp(max=lengths.numel() - 1)
    first_tile = torch.where(document > 0, ends[(document - 1).clamp(min=0)], 0)
    length = torch.where(surplus, 0, lengths[document])
    return torch.stack([bounds[document], length, tile - first_tile], 1).to(torch.int32)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Return a view's strides (b, h, s) for a kernel.

    The view is [b, h, s, d]. Dimensions of size 1 get stride 0: torch leaves theirs arbitrary, and kernels are
    recompiled for strides that are not a multiple of 16.

    Raises:
        ValueError: rows are too far apart for 32-bit offsets within a tile.
    """
    b, h, s = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    if s >= _MAX_ROW_STRIDE:
        raise ValueError(f'rows are {s} elements apart, below {_MAX_ROW_STRIDE} are supported: use format "bhsd"')
    return b, h, s


def last_contiguous(x: Tensor) -> Tensor:
    """Return `x`, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_launch(programs: int, kept_blocks: int, tiles_of_block: int) -> None:
    """Check that a launch and its tile counters fit in 32 bits.

    Counters count tiles over the kept blocks; offsets into tensors have 64 bits. Raises ValueError with a remedy.
    """
    if programs >= 2**31:
        raise ValueError(f"{programs} programs are more than one GPU launch can have: split the batch or the heads")
    if kept_blocks * tiles_of_block >= 2**31:
        raise ValueError(
            f"{kept_blocks} kept blocks in {tiles_of_block} tiles each are too many for 32-bit counters: "
            "let heads share patterns, or use larger blocks"
        )
