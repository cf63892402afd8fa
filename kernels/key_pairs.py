"""The work of the one-pass backward: pairs of 64-key tiles, and the 64-query tiles that keep either."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import BlockLayout

TILE = 64
ACTIVE_BITS, QUERY_BITS = 2, 20
MAX_GROUP = 2 ** (31 - ACTIVE_BITS - QUERY_BITS)


@dataclass(frozen=True)
class KeyPairs:
    """Int32 tensors on the layout's device.

    - ``meta`` [pairs, 8], most steps first: KV head, both key tiles, first step, masked steps, steps, 0, 0.
    - ``steps`` [n]: bit 0 and 1 whether each key tile is kept, then query tile (of positions), then the head within
      the group. A pair's masked steps come first: those that keep one tile only, cross the diagonal or the last key.
      A pair that no query keeps has one step that keeps neither.
    """

    meta: Tensor
    steps: Tensor
    first_tile: int
    num_tiles: int


def key_pairs(layout: BlockLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool) -> KeyPairs:
    """The pairs of every KV head; kept in the layout's cache."""
    key = ("key_pairs", num_kv_heads, s_q, s_k, query_offset, causal)
    if key not in layout.cache:
        layout.cache[key] = _build(layout, num_kv_heads, s_q, s_k, query_offset, causal)
    found: KeyPairs = layout.cache[key]
    return found


def _build(layout: BlockLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool) -> KeyPairs:
    device = layout.device
    ratio = layout.block_size // TILE
    first_tile, end_tile = query_offset // TILE, -(-(query_offset + s_q) // TILE)
    num_tiles, num_key_tiles = end_tile - first_tile, -(-s_k // TILE)
    num_pairs = -(-num_key_tiles // 2)
    group = layout.num_heads // num_kv_heads
    head, tile, key_tile = _kept_tiles(layout, ratio, first_tile, end_tile, num_key_tiles, causal)
    kv, member = head // group, head % group

    # halves of a block make a pair; of smaller blocks, those that about equally many queries keep
    if ratio > 1:
        place = torch.arange(num_pairs * 2, device=device).expand(num_kv_heads, -1)
        tile_at = place
    else:
        counts = torch.bincount(kv * num_key_tiles + key_tile, minlength=num_kv_heads * num_key_tiles)
        order = counts.view(num_kv_heads, num_key_tiles).sort(dim=1, descending=True, stable=True).indices
        place = torch.empty_like(order).scatter_(1, order, torch.arange(num_key_tiles, device=device).expand_as(order))
        tile_at = torch.full((num_kv_heads, num_pairs * 2), num_key_tiles, device=device)
        tile_at[:, :num_key_tiles] = order
    at = place[kv, key_tile]
    code = ((kv * num_pairs + at // 2) * group + member) * num_tiles + tile - first_tile
    code, inverse = torch.unique(code, return_inverse=True)
    active = torch.zeros_like(code).scatter_add_(0, inverse, 1 << (at % 2))

    per_pair = group * num_tiles
    without = (torch.bincount(code // per_pair, minlength=num_kv_heads * num_pairs) == 0).nonzero().flatten()
    code = torch.cat([code, without * per_pair])
    active = torch.cat([active, torch.zeros_like(without)])

    pair, member, tile = code // per_pair, code // num_tiles % group, code % num_tiles + first_tile
    tiles_of_pair = tile_at.reshape(-1, 2)
    masked = (active != 3) | ((tiles_of_pair + 1) * TILE > s_k).any(1)[pair]
    if causal:
        masked |= (tile[:, None] <= tiles_of_pair[pair]).any(1)
    order = (pair * 2 + (~masked).long()).sort(stable=True).indices
    steps = (member << (ACTIVE_BITS + QUERY_BITS) | tile << ACTIVE_BITS | active)[order].to(torch.int32)

    num_steps = torch.bincount(pair, minlength=len(tiles_of_pair))
    num_masked = torch.bincount(pair, weights=masked.double(), minlength=len(tiles_of_pair)).long()
    meta = torch.zeros(len(tiles_of_pair), 8, dtype=torch.int64, device=device)
    meta[:, 0] = torch.arange(len(tiles_of_pair), device=device) // num_pairs
    meta[:, 1:3] = tiles_of_pair
    meta[:, 3] = num_steps.cumsum(0) - num_steps
    meta[:, 4], meta[:, 5] = num_masked, num_steps
    heaviest = num_steps.sort(descending=True, stable=True).indices
    return KeyPairs(meta[heaviest].to(torch.int32), steps, first_tile, num_tiles)


def _kept_tiles(
    layout: BlockLayout, ratio: int, first_tile: int, end_tile: int, num_key_tiles: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Head, query tile and key tile of everything kept, in tiles of 64."""
    device, num_columns = layout.device, layout.num_key_blocks
    bounds = layout.column_offsets[::num_columns].tolist()
    column = torch.repeat_interleave(
        torch.arange(len(layout.column_offsets) - 1, device=device), layout.column_offsets.diff().long()
    )
    within = torch.arange(ratio, device=device)
    heads, tiles, keys = [], [], []
    for head, pattern in enumerate(layout.pattern_of_head.tolist()):
        kept = slice(bounds[pattern], bounds[pattern + 1])
        tile = layout.column_rows[kept].long()[:, None, None] * ratio + within[:, None]
        key = (column[kept] % num_columns)[:, None, None] * ratio + within
        tile, key = (x.flatten() for x in torch.broadcast_tensors(tile, key))
        keep = (tile >= first_tile) & (tile < end_tile) & (key < num_key_tiles)
        if causal:
            keep &= tile >= key
        tiles.append(tile[keep])
        keys.append(key[keep])
        heads.append(torch.full_like(tiles[-1], head))
    return torch.cat(heads), torch.cat(tiles), torch.cat(keys)
