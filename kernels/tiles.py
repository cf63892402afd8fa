"""What the Triton kernels share: tile loads, searches in the layout, and the tiles of packed documents."""

# Triton reads the annotations of its functions, and has none for their tensors.
# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

# a tile of at most 128 rows is addressed by 32-bit offsets from its 64-bit base
_MAX_ROW_STRIDE = 2**24


@triton.jit
def load_tile(
    base, start, stride, in_range,
    ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of a [rows, DIM] matrix as [ROWS, PADDED_DIM], zero where masked."""
    dims = tl.arange(0, PADDED_DIM)
    # the 64-bit product is one scalar a tile; the offsets within do not change from tile to tile
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
def store_tile(
    base, start, stride, in_range, values, ROWS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):  # fmt: skip
    """Write the rows of `values` [ROWS, PADDED_DIM] that are in range, cast to the pointer's type."""
    dims = tl.arange(0, PADDED_DIM)
    pointers = base + start.to(tl.int64) * stride
    pointers = pointers + tl.arange(0, ROWS)[:, None] * stride + dims[None, :]
    mask = in_range[:, None] & (dims < DIM)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def count_below(indices, begin, end, low, high, CHUNK: tl.constexpr):
    """How many of the ascending indices[begin:end] are below `low`, and how many below `high`."""
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
    """First position of a tile of a packed document, and the document's first row and length."""
    entry = tiles + 3 * tile.to(tl.int64)
    start = tl.load(entry)
    length = tl.load(entry + 1)
    first = tl.load(entry + 2) * ROWS
    return first, start, length


def document_tiles(cu_seqlens: Tensor, num_rows: int, rows_per_tile: int) -> Tensor:
    """Int32 [tiles, 3]: document start, document length and tile index within the document, for every tile.

    Its size depends only on the shapes, so that no device is waited for; surplus tiles have length 0.
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
    """Strides (b, h, s) of a view [b, h, s, d] for a kernel; 0 along dimensions of size 1.

    torch leaves those arbitrary, and the kernels are compiled anew for strides that are no multiple of 16.

    Raises:
        ValueError: rows are too far apart for 32-bit offsets within a tile.
    """
    b, h, s = (0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    if s >= _MAX_ROW_STRIDE:
        raise ValueError(f'rows are {s} elements apart, below {_MAX_ROW_STRIDE} are supported: use format "bhsd"')
    return b, h, s


def last_contiguous(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_launch(programs: int, kept_blocks: int, tiles_of_block: int) -> None:
    """Whether the launch and its counters, tiles over the kept blocks, fit 32 bits; offsets into tensors have 64.

    Raises ValueError if not, with what to change.
    """
    if programs >= 2**31:
        raise ValueError(f"{programs} programs are more than a GPU launches at once: split the batch or the heads")
    if kept_blocks * tiles_of_block >= 2**31:
        raise ValueError(
            f"{kept_blocks} kept blocks in {tiles_of_block} tiles each are too many for 32-bit counters: "
            "let heads share patterns, or use larger blocks"
        )
