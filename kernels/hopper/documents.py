"""Find query tiles of packed documents on the device, in one launch.

A tile has 128 rows.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp_fusion import with_fp_fusion
from ..launch import launch

COLUMNS = 4  # of the table: 16 bytes a row
_TILES = 64
_DOCUMENTS = 64


@with_fp_fusion
@triton.jit(do_not_specialize=["num_documents"], do_not_specialize_on_alignment=["cu_seqlens"])
def s2_attention_kernel_document_tiles(
    cu_seqlens, table, num_documents,
    TILE: tl.constexpr, TILES: tl.constexpr, DOCUMENTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A program places TILES tiles of one document.

    The first also counts all tiles.
    """
    document = tl.program_id(0)
    part = tl.program_id(1)
    start = tl.load(cu_seqlens + document).to(tl.int32)
    length = tl.load(cu_seqlens + document + 1).to(tl.int32) - start
    tile = part * TILES + tl.arange(0, TILES)
    counts = (document == 0) & (part == 0)
    if (part * TILES * TILE < length) | counts:
        place = tl.full([TILES], 1, tl.int32)
        total = num_documents * 0
        for first in range(0, num_documents, DOCUMENTS):
            other = first + tl.arange(0, DOCUMENTS)
            exists = other < num_documents
            begin = tl.load(cu_seqlens + other, mask=exists, other=0).to(tl.int32)
            end = tl.load(cu_seqlens + other + 1, mask=exists, other=0).to(tl.int32)
            tiles = (end - begin + TILE - 1) // TILE
            # tiles before ours: those further into their documents, and equally far ones of earlier documents
            further = tl.maximum(tiles[None, :] - tile[:, None] - 1, 0)
            alike = (tiles[None, :] > tile[:, None]) & (other < document)[None, :]
            place += tl.sum(further + alike.to(tl.int32), 1)
            total += tl.sum(tiles, 0)
        row = table + place * COLUMNS
        inside = tile * TILE < length
        tl.store(row, tile * 0 + start, mask=inside)
        tl.store(row + 1, tile * 0 + length, mask=inside)
        tl.store(row + 2, tile, mask=inside)
        if counts:
            tl.store(table, total)


def document_table(cu_seqlens: Tensor, num_rows: int, tile: int, cache: dict[Any, Any]) -> Tensor:
    """Build the table of document tiles: int32 [1 + n, 4].

    n is the maximum for documents of any lengths, so the host need not wait for the device. Row 0 starts with the
    number of tiles t. Rows 1 to t are the tiles, furthest into their documents first, because they see the most keys:
    document's first row, document's length, tile within the document. Later rows are never written. `cache` keeps the
    compiled kernel for this device.
    """
    num_documents = cu_seqlens.numel() - 1
    rows = 1 + num_rows // tile + num_documents
    table = torch.empty(rows, COLUMNS, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        s2_attention_kernel_document_tiles, (num_documents, -(-num_rows // (tile * _TILES)), 1),
        (cu_seqlens.contiguous(), table, num_documents, tile, _TILES, _DOCUMENTS, COLUMNS),
        cache=cache, key=("document_tiles_kernel", cu_seqlens.dtype, tile), device=cu_seqlens.device, num_warps=4,
    )  # fmt: skip
    return table
