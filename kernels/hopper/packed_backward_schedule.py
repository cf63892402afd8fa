"""Backward schedule for packed documents, built without reading from the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..bounds_cache import of_documents
from ..layout import BlockLayout
from ..tiles import document_tiles
from .backward_schedule import QUERY_BITS, BackwardSchedule, groups_of_patterns, pair_steps
from .kept_tiles import TILE, KeptTiles, kept_tiles_of_group

_LAST_TILE = 2**QUERY_BITS - 1


@dataclass(frozen=True)
class DocumentSteps:
    """Steps of a document as long as the layout.

    A shorter document's steps are the last of each pair's masked and unmasked ones. Key tiles 2j and 2j + 1 form pair j
    at any length. Within a pair and phase (masked or not), steps go from the last query tile to the first, and over the
    members within a tile.

    - ``steps`` int32 [n + 1], as in `BackwardSchedule`; the last one, of tile 0, keeps nothing.
    - ``order`` int64 [n + 1], ascending: (pair * 2 + phase) * 2^20 + 2^20 - 1 - query tile.
    - ``first_pair`` int64 [KV heads]: number of a KV head's pair 0.
    """

    steps: Tensor
    order: Tensor
    first_pair: Tensor


def packed_backward_schedule(
    layout: BlockLayout, num_kv_heads: int, cu_seqlens: Tensor, num_rows: int
) -> BackwardSchedule:
    """Call `pairs_of_documents`, once for all layers with this layout."""
    key = ("packed_backward_schedule", num_kv_heads)
    build = partial(pairs_of_documents, layout, num_kv_heads, cu_seqlens, num_rows)
    return of_documents(layout.cache, key, cu_seqlens, num_rows, build)


def pairs_of_documents(layout: BlockLayout, num_kv_heads: int, cu_seqlens: Tensor, num_rows: int) -> BackwardSchedule:
    """Build the causal schedule of packed documents.

    Documents start at rows `cu_seqlens` [documents + 1] of `num_rows`. ``meta`` has ten columns: after the first six of
    `BackwardSchedule`, the steps to skip between masked and unmasked ones, the document's first query tile
    (of `tiles`), first row and length. The number of programs suffices for any documents of `num_rows` rows; surplus
    programs have length 0 and one step that keeps nothing.
    """
    key = ("packed_steps", num_kv_heads)
    if key not in layout.cache:
        layout.cache[key] = _build(layout, num_kv_heads)
    document: DocumentSteps = layout.cache[key]
    tiles = document_tiles(cu_seqlens, num_rows, TILE)
    start, length, pair = document_tiles(cu_seqlens, num_rows, 2 * TILE).long().T.contiguous()
    first_tile = torch.searchsorted(tiles[:, 0].long().contiguous(), start)  # documents without rows have no tiles
    last = (length - 1) // TILE  # query tile

    phase = (document.first_pair[:, None] + pair) * 2 << QUERY_BITS  # [KV heads, programs]
    next_phase = phase + (1 << QUERY_BITS)
    wanted = torch.stack(
        [phase + _LAST_TILE - last, next_phase, next_phase + _LAST_TILE - last, next_phase + (1 << QUERY_BITS)]
    )
    first, masked_end, full, end = torch.searchsorted(document.order, wanted)
    masked, skipped = masked_end - first, full - masked_end
    spare = length == 0
    first = torch.where(spare, len(document.steps) - 1, first)
    masked = torch.where(spare, 1, masked)
    num_steps = torch.where(spare, 1, masked + end - full)
    kv = torch.arange(num_kv_heads, device=start.device)[:, None].expand_as(first)
    columns = (kv, pair * 2, pair * 2 + 1, first, masked, num_steps, skipped, first_tile, start, length)
    meta = torch.stack([x.expand_as(first) for x in columns], -1)
    # by KV head, most steps first
    longest = num_steps.argsort(dim=1, descending=True, stable=True)
    meta = meta.gather(1, longest[:, :, None].expand_as(meta)).flatten(0, 1)
    return BackwardSchedule(meta.to(torch.int32), document.steps, 0, len(tiles), tiles)


def _build(layout: BlockLayout, num_kv_heads: int) -> DocumentSteps:
    num_tiles = min(layout.num_query_blocks, layout.num_key_blocks) * layout.block_size // TILE
    num_pairs = -(-num_tiles // 2)
    parts: list[tuple[Tensor, Tensor]] = []
    first_pair: dict[tuple[int, ...], int] = {}
    groups = groups_of_patterns(layout, num_kv_heads)
    for group in dict.fromkeys(groups):
        kept = kept_tiles_of_group(layout, group, 0, num_tiles, num_tiles * TILE, True)
        first_pair[group] = len(first_pair) * num_pairs
        parts.append(_steps_of_group(kept, num_tiles, first_pair[group]))
    keep_nothing = torch.zeros(1, dtype=torch.int32, device=layout.device)
    beyond = torch.full((1,), len(first_pair) * num_pairs * 2 << QUERY_BITS, device=layout.device)
    steps = torch.cat([*(steps for steps, _ in parts), keep_nothing])
    if len(steps) >= 2**31:
        raise ValueError(f"{len(steps)} steps are too many for 32-bit indices: use larger blocks")
    return DocumentSteps(
        steps=steps,
        order=torch.cat([*(order for _, order in parts), beyond]),
        first_pair=torch.tensor([first_pair[group] for group in groups], device=layout.device),
    )


def _steps_of_group(kept: KeptTiles, num_tiles: int, first_pair: int) -> tuple[Tensor, Tensor]:
    num_pairs = -(-num_tiles // 2)
    tile_at = torch.arange(num_pairs * 2, device=kept.key.device)
    # a document with a pair has the query tile of its first keys: a step there gives the pair at least one step
    found = pair_steps(kept, tile_at, tile_at[::2], 0, num_tiles, num_tiles * TILE, True)
    pair, masked, member, tile, step = found
    order = ((first_pair + pair) * 2 + (~masked).long() << QUERY_BITS) + _LAST_TILE - tile
    by_member = member.sort(stable=True).indices
    at = by_member[order[by_member].sort(stable=True).indices]
    return step[at], order[at]
