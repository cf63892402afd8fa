"""Decoding schedule: the key blocks that each tile of query heads visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout

HEADS_PER_TILE = 16  # query heads per program: the minimum rows of a matrix product
_PAIRS_AT_ONCE = 1 << 22  # mask elements in int32 per piece: 16 MB of scratch


@dataclass(frozen=True)
class DecodeSchedule:
    """Lists of key blocks that the heads of each tile keep together.

    Tiles with the same patterns share one list. Tensors are int32.

    - ``list_of_tile`` [tiles]: the list of each tile; tiles are ordered by KV head.
    - ``offsets`` [lists * n_q + 1], ``columns`` [blocks]: query block i of list w visits key blocks
      ``columns[offsets[w * n_q + i] : offsets[w * n_q + i + 1]]``, ascending.
    - ``bits`` [blocks]: bit r is set where head r of the tile keeps the block; None where every head keeps all.
    - ``longest``: maximum number of blocks in a row.
    """

    list_of_tile: Tensor
    offsets: Tensor
    columns: Tensor
    bits: Tensor | None
    longest: int


def tiles_of_group(group: int) -> int:
    """Return the number of tiles for `group` query heads per KV head."""
    return -(-group // HEADS_PER_TILE)


def decode_schedule(layout: BlockLayout, num_kv_heads: int) -> DecodeSchedule:
    """Return the schedule of a layout whose heads share `num_kv_heads` KV heads.

    Built once and kept in ``layout.cache``; building makes the host wait for the device. If the heads of every tile
    share one pattern, the schedule reuses the layout's memory.
    """
    key = ("decode_schedule", num_kv_heads)
    if key not in layout.cache:
        layout.cache[key] = _make_schedule(layout, _patterns_of_tiles(layout, num_kv_heads))
    return layout.cache[key]


def _patterns_of_tiles(layout: BlockLayout, num_kv_heads: int) -> list[tuple[int, ...]]:
    group = layout.num_heads // num_kv_heads
    patterns = layout.patterns_of_heads("decoding").tolist()
    tiles = []
    for first in range(0, layout.num_heads, group):
        heads = patterns[first : first + group]
        tiles += [tuple(heads[at : at + HEADS_PER_TILE]) for at in range(0, group, HEADS_PER_TILE)]
    return tiles


def _make_schedule(layout: BlockLayout, tiles: list[tuple[int, ...]]) -> DecodeSchedule:
    if all(len(set(tile)) == 1 for tile in tiles):
        list_of_tile = torch.tensor([tile[0] for tile in tiles], dtype=torch.int32, device=layout.device)
        longest = int(layout.row_offsets.diff().max())
        return DecodeSchedule(list_of_tile, layout.row_offsets, layout.row_columns, None, longest)
    index = {tile: number for number, tile in enumerate(dict.fromkeys(tiles))}
    offsets = layout.row_offsets.tolist()
    rows_at_once = max(1, _PAIRS_AT_ONCE // layout.num_key_blocks)
    counts, columns, bits = [], [], []
    for tile in index:
        for begin in range(0, layout.num_query_blocks, rows_at_once):
            end = min(begin + rows_at_once, layout.num_query_blocks)
            members = _members(layout, offsets, tile, begin, end)
            row, column = members.nonzero(as_tuple=True)
            counts.append((members != 0).sum(1))
            columns.append(column.to(torch.int32))
            bits.append(members[row, column])
    walked = torch.cat(counts)
    starts = torch.zeros(len(walked) + 1, dtype=torch.int64, device=layout.device)
    torch.cumsum(walked, 0, out=starts[1:])
    if int(starts[-1]) >= 2**31:
        raise ValueError(f"{int(starts[-1])} key blocks to visit are too many for 32-bit indices: use larger blocks")
    return DecodeSchedule(
        list_of_tile=torch.tensor([index[tile] for tile in tiles], dtype=torch.int32, device=layout.device),
        offsets=starts.to(torch.int32),
        columns=torch.cat(columns),
        bits=torch.cat(bits),
        longest=int(walked.max()),
    )


def _members(layout: BlockLayout, offsets: list[int], tile: tuple[int, ...], begin: int, end: int) -> Tensor:
    """Return which heads of a tile keep each pair.

    The result is int32 [end - begin, n_k]: bit r is set where head r keeps the pair.
    """
    members = torch.zeros(end - begin, layout.num_key_blocks, dtype=torch.int32, device=layout.device)
    for pattern in set(tile):
        bits = sum(1 << slot for slot, of_slot in enumerate(tile) if of_slot == pattern)
        first, last = pattern * layout.num_query_blocks + begin, pattern * layout.num_query_blocks + end
        low, high = offsets[first], offsets[last]
        counts = layout.row_offsets[first : last + 1].diff().long()
        rows = torch.repeat_interleave(counts, output_size=high - low)
        members[rows, layout.row_columns[low:high].long()] += bits
    return members
