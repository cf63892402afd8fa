"""Backward schedule for Hopper: pairs of 64-key tiles with their 64-query tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import BlockLayout
from .kept_tiles import TILE, KeptTiles, kept_tiles_of_group
from .pair_parts import PairParts, cut_pairs, may_cut
from .program_order import program_order
from .shared_tiles import SharedTiles, divide, shared_tiles

ACTIVE_BITS, QUERY_BITS = 2, 20
_LENGTHS_KEPT = 8  # context parallel ranks alternate between two query ranges
MAX_GROUP = 2 ** (31 - ACTIVE_BITS - QUERY_BITS)


@dataclass(frozen=True)
class ScheduleOptions:
    """Choices for static layouts; `chosen_config` makes them.

    - ``second_pairs``: with blocks of 64 and grouped heads, divide a key tile's steps over two pairs
      (`shared_tiles`) where its neighbour lacks many of them, unless pairs are cut.
    - ``by_query_head``: with grouped heads, order programs by the query head that most of their steps visit, unless
      they then end much later (`program_order`).
    - ``query_tile``: queries of a step, 64 or 128.
    """

    second_pairs: bool = False
    by_query_head: bool = False
    query_tile: int = TILE


PLAIN = ScheduleOptions()


@dataclass(frozen=True)
class BackwardSchedule:
    """Pairs of key tiles and their steps; int32 on the layout's device.

    - ``meta`` [pairs, 8], in `program_order`: KV head, both key tiles, first step's index, number of masked steps,
      number of steps, first step, sequence of the batch (0 if all have the same pairs).
    - ``steps`` [n]: bits 0 and 1 say whether each key tile is kept, then come the query tile (of positions, as large as
      `ScheduleOptions` say) and the head within the group. A pair's masked steps come first: those that keep only one
      tile, or cross the diagonal or the last key. A pair that no query keeps has one step that keeps neither tile.
    """

    meta: Tensor
    steps: Tensor
    first_tile: int
    num_tiles: int
    tiles: Tensor | None = None  # of packed documents, as in `document_tiles` with 64 rows
    # if several rows of `meta` may have the same key tiles, each with some steps
    parts: PairParts | SharedTiles | None = None


def backward_schedule(
    layout: BlockLayout, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool, copies: int = 0,
    options: ScheduleOptions = PLAIN,
) -> BackwardSchedule:  # fmt: skip
    """Build the pairs of every KV head.

    Recent lengths are cached in the layout.

    Args:
        copies: sequences that share each pair, if pairs with many steps are cut (`cut_pairs`); 0: none is cut.
    """
    kept: dict[Any, BackwardSchedule] = layout.cache.setdefault("backward_schedule", {})
    key = (num_kv_heads, s_q, s_k, query_offset, causal, copies, options)
    if key not in kept:
        while len(kept) >= _LENGTHS_KEPT:
            del kept[next(iter(kept))]
        kept[key] = layout.scheduled(
            lambda source: _build(source, layout.device, num_kv_heads, s_q, s_k, query_offset, causal, copies, options)
        )
    return kept[key]


def _build(
    layout: BlockLayout, device: torch.device, num_kv_heads: int, s_q: int, s_k: int, query_offset: int, causal: bool,
    copies: int, options: ScheduleOptions,
) -> BackwardSchedule:  # fmt: skip
    """Build the pairs on the layout's device for a run on `device`."""
    first_tile, end_tile = query_offset // options.query_tile, -(-(query_offset + s_q) // options.query_tile)
    tiles = options.query_tile // TILE
    first_tile, end_tile = first_tile * tiles, end_tile * tiles
    limits = (first_tile, end_tile, s_k, causal)
    members = layout.num_heads // num_kv_heads
    second = options.second_pairs and layout.block_size == TILE and members > 1
    if not may_cut(members * (end_tile - first_tile) // tiles):
        copies = 0
    cut = None
    if copies or not second:
        meta, steps = _pairs_of_heads(layout, num_kv_heads, *limits, replace(options, second_pairs=False))
        cut = cut_pairs(meta, steps, copies, device) if copies else None
    if cut is not None:
        meta = cut[0]
    elif second:
        meta, steps = _pairs_of_heads(layout, num_kv_heads, *limits, options)
    member = None
    if options.by_query_head and members > 1:
        member = _main_member(meta, steps, members, -(-s_k // TILE))
    order = program_order(meta[:, 7] * num_kv_heads + meta[:, 0], meta[:, 5], device, member)
    meta = meta[order]
    parts: PairParts | SharedTiles | None = None
    if cut is not None:
        parts = replace(cut[1], slots=cut[1].slots[order])
    elif second:
        parts = shared_tiles(meta)
    return BackwardSchedule(meta.to(torch.int32), steps, first_tile, end_tile - first_tile, parts=parts)


def _pairs_of_heads(
    layout: BlockLayout, num_kv_heads: int, first_tile: int, end_tile: int, s_k: int, causal: bool,
    options: ScheduleOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Build `meta` and `steps` of all KV heads, unordered."""
    groups = groups_of_patterns(layout, num_kv_heads)
    # KV heads with the same patterns share their steps; one at a time, to save memory
    metas: dict[tuple[int, ...], Tensor] = {}
    of_groups: list[Tensor] = []
    num_steps = 0
    for group in dict.fromkeys(groups):
        kept = kept_tiles_of_group(layout, group, first_tile, end_tile, s_k, causal)
        meta, steps = _pairs_of_group(kept, layout.block_size // TILE, first_tile, end_tile, s_k, causal, options)
        meta[:, 3] += num_steps
        num_steps += len(steps)
        metas[group] = meta
        of_groups.append(steps)
    if num_steps >= 2**31:
        raise ValueError(f"{num_steps} steps are too many for 32-bit indices: use larger blocks")
    meta = torch.cat([metas[group] for group in groups])
    device = layout.device
    pairs = torch.tensor([len(metas[group]) for group in groups], device=device)
    number = torch.repeat_interleave(torch.arange(len(groups), device=device), pairs, output_size=len(meta))
    meta[:, 0] = number % num_kv_heads
    meta[:, 7] = number // num_kv_heads
    steps = torch.cat(of_groups)
    meta[:, 6] = steps[meta[:, 3]]
    return meta, steps


def _main_member(meta: Tensor, steps: Tensor, group: int, num_key_tiles: int) -> Tensor:
    """Return the member that most of each program's steps visit.

    A long program sweeps over one member's queries; those that run together should sweep over the same. Where no member
    has more than half of the steps, as in a local window, the first key tile's place decides, to distribute programs
    evenly.
    """
    member, begin = steps >> (ACTIVE_BITS + QUERY_BITS), meta[:, 3]
    counts = []
    for number in range(group):
        before = torch.nn.functional.pad((member == number).cumsum(0), (1, 0))
        counts.append(before[begin + meta[:, 5]] - before[begin])
    most, main = torch.stack(counts, 1).max(1)
    place = (meta[:, 1] * group // num_key_tiles).clamp(max=group - 1)
    return torch.where(2 * most > meta[:, 5], main, place)


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
    kept: KeptTiles, ratio: int, first_tile: int, end_tile: int, s_k: int, causal: bool,
    options: ScheduleOptions,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Build `meta` and `steps` of one KV head from kept tiles."""
    device = kept.key.device
    num_key_tiles = -(-s_k // TILE)
    tile_at = torch.arange(-(-num_key_tiles // 2) * 2, device=device)  # halves of a block make a pair
    limits = (first_tile, end_tile, s_k, causal, options.query_tile // TILE)
    divided = None
    if ratio == 1 and kept.members > 1 and options.second_pairs:
        divided = divide(kept, first_tile, end_tile - first_tile, num_key_tiles)
    if divided is not None:
        meta, steps = _pairs(divided.first, tile_at, *limits)
        num_pairs = len(divided.tiles) // 2
        others = torch.arange(int(divided.tiles.max()) // 2 * 2 + 2, device=device)
        others = torch.cat([divided.tiles, others[~torch.isin(others, divided.tiles)]])
        second, second_steps = _pairs(divided.second, others, *limits)
        second = second[:num_pairs]  # the others have no steps of their own
        second[:, 3] += len(steps)
        return torch.cat([meta, second]), torch.cat([steps, second_steps[: int(second[:, 5].sum())]])
    if ratio == 1:
        tile_at[:num_key_tiles] = _cheapest_order(kept, end_tile - first_tile, first_tile, num_key_tiles)
    return _pairs(kept, tile_at, *limits)


def _pairs(
    kept: KeptTiles, tile_at: Tensor, first_tile: int, end_tile: int, s_k: int, causal: bool,
    query_tiles: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Build `meta` and `steps` of pairs ``tile_at[2j]``, ``tile_at[2j + 1]``."""
    if query_tiles > 1:
        first_tile, end_tile = first_tile // query_tiles, end_tile // query_tiles
        kept = kept.of_larger_tiles(query_tiles, end_tile, len(tile_at))
    num_pairs = len(tile_at) // 2
    pair, masked, member, tile, steps = pair_steps(
        kept, tile_at, None, first_tile, end_tile, s_k, causal, query_tiles
    )  # fmt: skip
    num_steps = torch.bincount(pair, minlength=num_pairs)
    meta = torch.zeros(num_pairs, 8, dtype=torch.int64, device=tile_at.device)
    meta[:, 1:3] = tile_at.view(-1, 2)
    meta[:, 3] = num_steps.cumsum(0) - num_steps
    meta[:, 4] = torch.bincount(pair[masked], minlength=num_pairs)
    meta[:, 5] = num_steps
    return meta, steps[_step_order(pair, masked, member, tile)]


def pair_steps(
    kept: KeptTiles, tile_at: Tensor, needed: Tensor | None,
    first_tile: int, end_tile: int, s_k: int, causal: bool, query_tiles: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute all steps of a group, unordered.

    Returns pair, whether it needs a mask, member, query tile and the packed int32. Key tiles ``tile_at[2j]`` and
    ``tile_at[2j + 1]`` form pair j. A pair that no head keeps gets a step that keeps nothing; with `needed` [pairs], so
    does each pair whose needed query tile no head keeps. A query tile is as large as `query_tiles` key tiles.
    """
    num_tiles, num_pairs = end_tile - first_tile, len(tile_at) // 2
    place = torch.empty_like(tile_at).scatter_(0, tile_at, torch.arange(len(tile_at), device=tile_at.device))
    at = place[kept.key]
    per_pair = kept.members * num_tiles
    row = kept.member * num_tiles + kept.query - first_tile
    code, inverse = torch.unique(at // 2 * per_pair + row, return_inverse=True)
    active = torch.zeros_like(code).scatter_add_(0, inverse, 1 << (at % 2))

    counted = code // per_pair
    if needed is not None:
        counted = counted[code % num_tiles + first_tile == needed[counted]]
    without = (torch.bincount(counted, minlength=num_pairs) == 0).nonzero().flatten()
    code = torch.cat([code, without * per_pair + (0 if needed is None else needed[without] - first_tile)])
    active = torch.cat([active, torch.zeros_like(without)])

    pair, member, tile = code // per_pair, code // num_tiles % kept.members, code % num_tiles + first_tile
    tiles_of_pair = tile_at.view(-1, 2)
    masked = (active != 3) | ((tiles_of_pair + 1) * TILE > s_k).any(1)[pair]
    if causal:
        masked |= (tile[:, None] * query_tiles <= tiles_of_pair[pair]).any(1)
    return pair, masked, member, tile, (member << (ACTIVE_BITS + QUERY_BITS) | tile << ACTIVE_BITS | active).int()


def _cheapest_order(kept: KeptTiles, num_tiles: int, first_tile: int, num_key_tiles: int) -> Tensor:
    """Return the order of key tiles with the fewest steps, of three.

    Neighbours 2j and 2j + 1 form pairs. The orders are: unchanged, which suits a local window; by the number of queries
    that keep a tile; and, where members keep different columns, first the tiles that all keep alike, unchanged, then
    the others by the member that keeps them most, then by number.
    """
    group = kept.members
    row = kept.query - first_tile + kept.member * num_tiles
    counts = torch.bincount(kept.key * group + kept.member, minlength=num_key_tiles * group).view(-1, group)
    natural = torch.arange(num_key_tiles, device=row.device)
    orders = [counts.sum(1).sort(descending=True, stable=True).indices, natural]
    if group > 1:
        most, member = counts.max(1)
        alike = most == counts.amin(1)
        order = torch.where(alike, 0, most).sort(descending=True, stable=True).indices
        orders.append(order[torch.where(alike, -1, member)[order].sort(stable=True).indices])
    return min(orders, key=lambda order: _cost(order, row, kept.key, group * num_tiles))


def _cost(order: Tensor, row: Tensor, key_tile: Tensor, num_rows: int) -> int:
    """Count steps if neighbours in the order form pairs.

    A pair that no query keeps counts one.
    """
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    steps = torch.unique(place[key_tile] // 2 * num_rows + row)
    return steps.numel() + -(-len(order) // 2) - torch.unique_consecutive(steps // num_rows).numel()
