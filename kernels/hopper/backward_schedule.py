"""Backward schedule for Hopper: pairs of 64-key tiles with their 64-query tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import BlockLayout
from .pair_parts import PairParts, cut_pairs
from .program_order import program_order

TILE = 64
ACTIVE_BITS, QUERY_BITS = 2, 20
_LENGTHS_KEPT = 8  # context parallel ranks alternate between two query ranges
MAX_GROUP = 2 ** (31 - ACTIVE_BITS - QUERY_BITS)


@dataclass(frozen=True)
class BackwardSchedule:
    """Pairs of key tiles and their steps; int32 on the layout's device.

    - ``meta`` [pairs, 8], in `program_order`: KV head, both key tiles, first step's index, number of masked steps,
      number of steps, first step, sequence of the batch (0 if all have the same pairs).
    - ``steps`` [n]: bits 0 and 1 say whether each key tile is kept, then come the query tile (of positions) and the
      head within the group. A pair's masked steps come first: those that keep only one tile, or cross the diagonal or
      the last key. A pair that no query keeps has one step that keeps neither tile.
    """

    meta: Tensor
    steps: Tensor
    first_tile: int
    num_tiles: int
    tiles: Tensor | None = None  # of packed documents, as in `document_tiles` with 64 rows
    parts: PairParts | None = None  # if several rows of `meta` may have the same key tiles, each with some steps


def backward_schedule(
    layout: BlockLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool, copies: int = 0
) -> BackwardSchedule:
    """Build the pairs of every KV head.

    Recent lengths are cached in the layout.

    Args:
        copies: sequences that share each pair, if pairs with many steps are cut (`cut_pairs`); 0: none is cut.
    """
    kept: dict[Any, BackwardSchedule] = layout.cache.setdefault("backward_schedule", {})
    key = (num_kv_heads, s_q, s_k, query_offset, causal, copies)
    if key not in kept:
        while len(kept) >= _LENGTHS_KEPT:
            del kept[next(iter(kept))]
        kept[key] = _build(layout, num_kv_heads, s_q, s_k, query_offset, causal, copies)
    return kept[key]


def _build(
    layout: BlockLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool, copies: int
) -> BackwardSchedule:  # fmt: skip
    device = layout.device
    first_tile, end_tile = query_offset // TILE, -(-(query_offset + s_q) // TILE)
    groups = groups_of_patterns(layout, num_kv_heads)
    # KV heads with the same patterns share their steps; one at a time, to save memory
    metas: dict[tuple[int, ...], Tensor] = {}
    of_groups: list[Tensor] = []
    num_steps = 0
    for group in dict.fromkeys(groups):
        kept = kept_tiles_of_group(layout, group, first_tile, end_tile, s_k, causal)
        meta, steps = _pairs_of_group(kept, layout.block_size // TILE, first_tile, end_tile, s_k, causal)
        meta[:, 3] += num_steps
        num_steps += len(steps)
        metas[group] = meta
        of_groups.append(steps)
    if num_steps >= 2**31:
        raise ValueError(f"{num_steps} steps are too many for 32-bit indices: use larger blocks")
    meta = torch.stack([metas[group] for group in groups])
    number = torch.arange(len(groups), device=device)[:, None]
    meta[:, :, 0] = number % num_kv_heads
    meta[:, :, 7] = number // num_kv_heads
    meta = meta.flatten(0, 1)
    steps = torch.cat(of_groups)
    meta[:, 6] = steps[meta[:, 3]]
    cut = cut_pairs(meta, steps, copies) if copies else None
    meta, parts = (meta, None) if cut is None else cut
    order = program_order(meta[:, 7] * num_kv_heads + meta[:, 0], meta[:, 5])
    if parts is not None:
        parts = replace(parts, slots=parts.slots[order])
    return BackwardSchedule(meta[order].to(torch.int32), steps, first_tile, end_tile - first_tile, parts=parts)


def _step_order(pair: Tensor, masked: Tensor, member: Tensor, tile: Tensor) -> Tensor:
    """Order a pair's steps: masked first, then the last query tiles.

    All long pairs have the last queries in common, not the first, so this makes them visit the same rows together.
    """
    order = tile.sort(descending=True, stable=True).indices
    for key in (member, (~masked).long(), pair):
        order = order[key[order].sort(stable=True).indices]
    return order


def groups_of_patterns(layout: BlockLayout, num_kv_heads: int) -> list[tuple[int, ...]]:
    """Return each KV head's patterns, per sequence if these differ."""
    return [tuple(x) for x in layout.pattern_of_head.reshape(layout.batch_size * num_kv_heads, -1).tolist()]


def _pairs_of_group(
    kept: list[tuple[Tensor, Tensor]], ratio: int, first_tile: int, end_tile: int, s_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Build `meta` and `steps` of one KV head from kept tiles.

    Tiles are the query and key tiles that every head of the group keeps.
    """
    device = kept[0][0].device
    num_key_tiles = -(-s_k // TILE)
    num_pairs = -(-num_key_tiles // 2)
    tile_at = torch.arange(num_pairs * 2, device=device)  # halves of a block make a pair
    if ratio == 1:
        tile_at[:num_key_tiles] = _cheapest_order(kept, end_tile - first_tile, first_tile, num_key_tiles)
    pair, masked, member, tile, steps = pair_steps(kept, tile_at, None, first_tile, end_tile, s_k, causal)
    num_steps = torch.bincount(pair, minlength=num_pairs)
    meta = torch.zeros(num_pairs, 8, dtype=torch.int64, device=device)
    meta[:, 1:3] = tile_at.view(-1, 2)
    meta[:, 3] = num_steps.cumsum(0) - num_steps
    meta[:, 4] = torch.bincount(pair[masked], minlength=num_pairs)
    meta[:, 5] = num_steps
    return meta, steps[_step_order(pair, masked, member, tile)]


def pair_steps(
    kept: list[tuple[Tensor, Tensor]], tile_at: Tensor, needed: Tensor | None,
    first_tile: int, end_tile: int, s_k: int, causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute all steps of a group, unordered.

    Returns pair, whether it needs a mask, member, query tile and the packed int32. Key tiles ``tile_at[2j]`` and
    ``tile_at[2j + 1]`` form pair j. A pair that no head keeps gets a step that keeps nothing; with `needed` [pairs], so
    does each pair whose needed query tile no head keeps.
    """
    tile, key_tile = torch.cat([t for t, _ in kept]), torch.cat([k for _, k in kept])
    member = torch.cat([torch.full_like(t, m) for m, (t, _) in enumerate(kept)])
    num_tiles, num_pairs = end_tile - first_tile, len(tile_at) // 2
    place = torch.empty_like(tile_at).scatter_(0, tile_at, torch.arange(len(tile_at), device=tile.device))
    at = place[key_tile]
    per_pair = len(kept) * num_tiles
    code, inverse = torch.unique(at // 2 * per_pair + member * num_tiles + tile - first_tile, return_inverse=True)
    active = torch.zeros_like(code).scatter_add_(0, inverse, 1 << (at % 2))

    counted = code // per_pair
    if needed is not None:
        counted = counted[code % num_tiles + first_tile == needed[counted]]
    without = (torch.bincount(counted, minlength=num_pairs) == 0).nonzero().flatten()
    code = torch.cat([code, without * per_pair + (0 if needed is None else needed[without] - first_tile)])
    active = torch.cat([active, torch.zeros_like(without)])

    pair, member, tile = code // per_pair, code // num_tiles % len(kept), code % num_tiles + first_tile
    tiles_of_pair = tile_at.view(-1, 2)
    masked = (active != 3) | ((tiles_of_pair + 1) * TILE > s_k).any(1)[pair]
    if causal:
        masked |= (tile[:, None] <= tiles_of_pair[pair]).any(1)
    return pair, masked, member, tile, (member << (ACTIVE_BITS + QUERY_BITS) | tile << ACTIVE_BITS | active).int()


def _cheapest_order(kept: list[tuple[Tensor, Tensor]], num_tiles: int, first_tile: int, num_key_tiles: int) -> Tensor:
    """Return the order of key tiles with the fewest steps, of three.

    Neighbours 2j and 2j + 1 form pairs. The orders are: unchanged, which suits a local window; by the number of queries
    that keep a tile; and, where members keep different columns, first the tiles that all keep alike, unchanged, then
    the others by the member that keeps them most, then by number.
    """
    group = len(kept)
    row = torch.cat([tile - first_tile + member * num_tiles for member, (tile, _) in enumerate(kept)])
    key_tile = torch.cat([key for _, key in kept])
    counts = torch.bincount(key_tile * group + row // num_tiles, minlength=num_key_tiles * group).view(-1, group)
    natural = torch.arange(num_key_tiles, device=row.device)
    orders = [counts.sum(1).sort(descending=True, stable=True).indices, natural]
    if group > 1:
        most, member = counts.max(1)
        alike = most == counts.amin(1)
        order = torch.where(alike, 0, most).sort(descending=True, stable=True).indices
        orders.append(order[torch.where(alike, -1, member)[order].sort(stable=True).indices])
    return min(orders, key=lambda order: _cost(order, row, key_tile, group * num_tiles))


def _cost(order: Tensor, row: Tensor, key_tile: Tensor, num_rows: int) -> int:
    """Count steps if neighbours in the order form pairs.

    A pair that no query keeps counts one.
    """
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    steps = torch.unique(place[key_tile] // 2 * num_rows + row)
    return steps.numel() + -(-len(order) // 2) - torch.unique_consecutive(steps // num_rows).numel()


def kept_tiles_of_group(
    layout: BlockLayout, group: tuple[int, ...], first_tile: int, end_tile: int, s_k: int, causal: bool
) -> list[tuple[Tensor, Tensor]]:
    """Return query and key tiles that each pattern keeps.

    Query tiles are in [first_tile, end_tile).
    """
    bounds = layout.column_offsets[:: layout.num_key_blocks].tolist()
    return [_kept_tiles(layout, p, bounds[p], bounds[p + 1], first_tile, end_tile, s_k, causal) for p in group]


def _kept_tiles(
    layout: BlockLayout, pattern: int, begin: int, end: int, first_tile: int, end_tile: int, s_k: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return query and key tiles of 64 that a pattern keeps.

    The pattern's columns lie in [begin, end).
    """
    n_k, device = layout.num_key_blocks, layout.device
    within = torch.arange(layout.block_size // TILE, device=device)
    counts = layout.column_offsets[pattern * n_k : (pattern + 1) * n_k + 1].diff().long()
    column = torch.repeat_interleave(torch.arange(n_k, device=device), counts, output_size=end - begin)
    tile = layout.column_rows[begin:end].long()[:, None, None] * len(within) + within[:, None]
    key = column[:, None, None] * len(within) + within
    tile, key = (x.flatten() for x in torch.broadcast_tensors(tile, key))
    keep = (tile >= first_tile) & (tile < end_tile) & (key * TILE < s_k)
    if causal:
        keep &= tile >= key
    return tile[keep], key[keep]
