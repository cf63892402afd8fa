"""Forward schedule for Hopper: the key chunks of each 128-row query tile.

A chunk is min(B, 128) keys. A step takes 128 keys: one chunk, or two of 64 that need not be adjacent. Two query blocks
of 64 share a tile and visit the union of their chunks; each half of the tile drops what it does not keep. Thus blocks
of 64, 128 and 256 all have steps of 128 x 128, which use the tensor cores best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout

TILE = 128  # query rows per tile, and keys per step
_HALVES = 2  # of 64 rows, each computed by one warpgroup
_BOTH = 3  # flags: bits of the halves that keep a chunk
_PAIRS_AT_ONCE = 2**18
_HEAD_CLASSES = 16  # heads whose work differs by less than 1/16 of the largest keep their order

Pattern = tuple[int, int, int]  # its number, and the range of its pairs in `row_columns`


@dataclass(frozen=True)
class ForwardSchedule:
    """Steps of all tiles; int32 tensors.

    Tiles are numbered `slot * tiles_per_pattern + tile`, with one slot per pattern in use.

    - ``head_order`` [H], or [batch, H] if ``batched``: heads, those with the most work first; ``head_slot``, the same
      shape: the slots of their patterns.
    - ``step_offsets`` [tiles + 1]: first step of a tile, at least one each; if ``batched`` [tiles, 2]: its first step
      and the one after its last.
    - ``full_offsets`` [tiles]: a tile's first step that needs no mask; never its first step.
    - ``chunks`` [steps * (128 // chunk_keys)]: chunk index * 4 + the halves that keep it. Padding is a chunk after the
      last key that no half keeps.
    """

    chunk_keys: int
    tiles_per_pattern: int
    head_order: Tensor
    head_slot: Tensor
    step_offsets: Tensor
    full_offsets: Tensor
    chunks: Tensor

    @property
    def batched(self) -> bool:
        """Whether every sequence has separate slots for its heads."""
        return self.head_order.dim() == 2


def forward_schedule(layout: BlockLayout, *, causal: bool, query_end: int, s_k: int) -> ForwardSchedule:
    """Build the steps of queries up to `query_end` over `s_k` keys.

    They are built where the layout was, and kept in its cache: one for the case that causality alone masks the keys
    from s_k on (any lengths), and one for the most recent other s_k.
    """
    tail = None if causal and s_k >= query_end else s_k
    key = ("hopper_forward_schedule", causal, tail is None)
    cached = layout.cache.get(key)
    if cached is None or cached[0] != tail:
        cached = layout.cache[key] = (tail, layout.scheduled(lambda source: _build(source, causal, tail)))
    schedule: ForwardSchedule = cached[1]
    return schedule


def _build(layout: BlockLayout, causal: bool, s_k: int | None) -> ForwardSchedule:
    used, slot_of_head = layout.pattern_of_head.squeeze(0).unique(return_inverse=True)
    n_q = layout.num_query_blocks
    bounds = layout.row_offsets[torch.stack([used * n_q, (used + 1) * n_q]).long()].tolist()
    num_tiles = -(-n_q * layout.block_size // TILE)
    chunk_keys = min(layout.block_size, TILE)
    patterns = list(zip(used.tolist(), *bounds, strict=True))
    parts = [_steps_of_patterns(some, layout, num_tiles, causal, s_k) for some in _at_once(patterns)]
    steps, masked, chunks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(steps) and len(chunks) >= 2**31 - 2**16:
        raise ValueError(f"{len(chunks)} kept chunks are too many for 32-bit indices: use larger blocks")
    step_offsets = torch.zeros(len(steps) + 1, dtype=torch.int64, device=layout.device)
    torch.cumsum(steps, 0, out=step_offsets[1:])

    work_of_slot = steps.view(len(used), num_tiles).sum(1)
    classes = work_of_slot * _HEAD_CLASSES // work_of_slot.max()
    head_order = classes[slot_of_head].argsort(descending=True, stable=True)
    offsets = step_offsets.to(torch.int32)
    return ForwardSchedule(
        chunk_keys=chunk_keys,
        tiles_per_pattern=num_tiles,
        head_order=head_order.to(torch.int32),
        head_slot=slot_of_head.gather(-1, head_order).to(torch.int32),
        step_offsets=offsets if layout.batch_size == 1 else torch.stack([offsets[:-1], offsets[1:]], 1),
        full_offsets=(step_offsets[:-1] + masked).to(torch.int32),
        chunks=chunks.to(torch.int32),
    )


def _at_once(patterns: list[Pattern]) -> Iterator[list[Pattern]]:
    """Divide patterns into runs of few pairs.

    Together they take fewer operators, one by one less memory.
    """
    run: list[Pattern] = []
    for pattern in patterns:
        if run and pattern[2] - run[0][1] > _PAIRS_AT_ONCE:
            yield run
            run = []
        run.append(pattern)
    yield run


def _steps_of_patterns(
    patterns: list[Pattern], layout: BlockLayout, num_tiles: int, causal: bool, s_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return steps and masked steps of each tile, and all chunks.

    Patterns have `num_tiles` tiles each, one pattern after the other.
    """
    n_q, rows = layout.num_query_blocks, num_tiles * TILE // layout.block_size
    first = torch.arange(len(patterns), device=layout.device) * rows
    row = first[:, None] + torch.arange(n_q, device=layout.device)
    counts = torch.cat(
        [layout.row_offsets[pattern * n_q : (pattern + 1) * n_q + 1].diff() for pattern, _, _ in patterns]
    )
    column = torch.cat([layout.row_columns[begin:end] for _, begin, end in patterns]).long()
    row = torch.repeat_interleave(row.flatten(), counts.long(), output_size=len(column))
    tile, chunk, flags = _chunks_of_patterns(row, column, layout.block_size, rows, causal)
    size = min(layout.block_size, TILE)
    num_chunks = -(-layout.num_key_blocks * layout.block_size // size)
    if s_k is not None:
        inside = chunk * size < s_k
        tile, chunk, flags = tile[inside], chunk[inside], flags[inside]
    masked = flags != _BOTH
    if causal:
        masked |= (chunk + 1) * size - 1 > tile % num_tiles * TILE
    if s_k is not None:
        masked |= (chunk + 1) * size > s_k

    # masked chunks first; both kinds from the last key to the first
    order = ((tile * 2 + ~masked) * num_chunks + num_chunks - 1 - chunk).argsort()
    tile, chunk, flags, masked = tile[order], chunk[order], flags[order], masked[order]
    per_step = TILE // size
    kept = torch.bincount(tile, minlength=len(patterns) * num_tiles)
    needing_mask = torch.bincount(tile[masked], minlength=len(kept))
    steps = ((kept + per_step - 1) // per_step).clamp(min=1)
    padding = steps * per_step - kept
    masked_steps = ((needing_mask + padding + per_step - 1) // per_step).clamp(min=1)

    # padding lies between the masked chunks and the full ones
    first_out = ((steps.cumsum(0) - steps) * per_step)[tile]
    first_in = (kept.cumsum(0) - kept)[tile]
    place = first_out + torch.arange(len(tile), device=tile.device) - first_in
    place += padding[tile] * ~masked
    chunks = torch.full((int(steps.sum()) * per_step,), num_chunks << 2, dtype=torch.int64, device=tile.device)
    chunks[place] = (chunk << 2) | flags
    return steps, masked_steps, chunks


def _chunks_of_patterns(
    row: Tensor, column: Tensor, block: int, rows: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tile, chunk and flags of every chunk that a tile keeps.

    Chunks that causality masks entirely are left out. Each pattern has `rows` rows.
    """
    if block >= TILE:
        parts = torch.arange(block // TILE, device=row.device)
        tile, chunk = torch.broadcast_tensors(
            (row[:, None] * len(parts) + parts)[:, :, None], (column[:, None] * len(parts) + parts)[:, None, :]
        )
        tile, chunk = tile.flatten(), chunk.flatten()
        if causal:
            seen = chunk <= tile % (rows * len(parts))
            tile, chunk = tile[seen], chunk[seen]
        return tile, chunk, torch.full_like(tile, _BOTH)
    assert block * _HALVES == TILE
    if causal:
        seen = column <= row % rows
        row, column = row[seen], column[seen]
    width = int(column.max()) + 1 if len(column) else 1
    pair, inverse = (row // _HALVES * width + column).unique(return_inverse=True)
    flags = torch.zeros_like(pair).scatter_add_(0, inverse, 1 << row % _HALVES)
    return pair // width, pair % width, flags
