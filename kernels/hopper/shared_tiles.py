"""Give key tiles whose steps keep no neighbour second partners.

Blocks of 64 keys are visited in pairs. Heads of a group keep their own columns besides what all keep (a local window),
so no single order of tiles suits both: neighbours share the window, tiles of one head's columns share that head's
queries. Here neighbours are visited together where both are kept, and the rest of a tile's steps, if it is long,
together with that of a tile which mostly the same head keeps. Both programs store float32 sums, which one kernel adds.
"""

# Triton interprets the annotations of its functions, so tensor arguments have none.
# mypy: allow-untyped-defs

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp_fusion import with_fp_fusion
from ..tiles import store_tile, strides
from .kept_tiles import KeptTiles

_LEAST_STEPS = 16  # a tile with fewer that its neighbour lacks keeps them in its first pair
_AT_ONCE = 16  # keys
_SUM_COLUMNS = 5
_COLUMNS = tl.constexpr(_SUM_COLUMNS)


@dataclass(frozen=True)
class Divided:
    """A group's kept tiles, divided over two sets of pairs.

    - ``first``: those that neighbours 2j and 2j + 1 visit.
    - ``second``: those that second pairs visit.
    - ``tiles`` [2n]: key tiles of the second pairs.
    """

    first: KeptTiles
    second: KeptTiles
    tiles: Tensor


@dataclass(frozen=True)
class SharedTiles:
    """Where programs put dk and dv sums, and what to add afterwards.

    - ``slots`` int32 [programs]: slot of the program's sums; -1: it stores dk and dv itself.
    - ``sums`` int32 [n, 5]: a tile's one or two places (twice the slot, plus its side of the pair; -1: none), KV head,
      sequence, first key.
    """

    slots: Tensor
    sums: Tensor
    num_slots: int


def divide(kept: KeptTiles, first_tile: int, num_tiles: int, num_key_tiles: int) -> Divided | None:
    """Divide a group's kept tiles.

    Returns None if no tile has many steps that its neighbour lacks. Slots of the sums take no more memory than the
    accumulator of dq: under context parallel few queries may read very many keys.
    """
    group, member, key = kept.members, kept.member, kept.key
    code = key // 2 * (group * num_tiles) + kept.query - first_tile + member * num_tiles
    _, inverse, count = torch.unique(code, return_inverse=True, return_counts=True)
    alone = count[inverse] == 1
    own = torch.bincount(key[alone] * group + member[alone], minlength=num_key_tiles * group).view(-1, group)
    tiles = (own.sum(1) > _LEAST_STEPS).nonzero().flatten()
    most_tiles = _most_tiles(group * num_tiles, num_key_tiles)
    if len(tiles) > most_tiles:
        tiles = tiles[own[tiles].sum(1).sort(descending=True, stable=True).indices[:most_tiles]].sort().values
    if len(tiles) < 2:
        return None
    moved = alone & torch.isin(key, tiles)
    most, owner = own[tiles].max(1)
    order = most.sort(descending=True, stable=True).indices
    tiles = tiles[order[owner[order].sort(stable=True).indices]]
    if len(tiles) % 2:  # the last one's partner keeps nothing there
        others = torch.arange(num_key_tiles + 1, device=tiles.device)
        tiles = torch.cat([tiles, others[~torch.isin(others, tiles)][:1]])
    return Divided(kept.at(~moved), kept.at(moved), tiles)


def _most_tiles(num_rows: int, num_key_tiles: int) -> int:
    """Return how many key tiles may have second partners.

    A slot takes the memory of four of the accumulator's `num_rows` query tiles. Each second pair needs one, and each
    pair of neighbours of which a tile is in a second pair.
    """
    most_slots = num_rows // 4
    return max(most_slots * 2 // 3, 2 * most_slots - num_key_tiles) // 2 * 2


def shared_tiles(meta: Tensor) -> SharedTiles | None:
    """Give slots to programs that share a key tile.

    None if there are none. Rows are those of `BackwardSchedule.meta`, in their final order.
    """
    tiles = meta[:, 1:3]
    head = meta[:, 7] * (meta[:, 0].max() + 1) + meta[:, 0]
    code = head[:, None] * (tiles.max() + 1) + tiles
    _, inverse, count = torch.unique(code, return_inverse=True, return_counts=True)
    shares = (count[inverse] > 1).any(1)
    num_slots = int(shares.sum())
    if not num_slots:
        return None
    slots = torch.where(shares, shares.cumsum(0) - 1, -1)
    rows = shares.nonzero().flatten()
    place = (slots[rows, None] * 2 + torch.arange(2, device=meta.device)).flatten()
    order = code[rows].flatten().argsort(stable=True)
    of_place, place = code[rows].flatten()[order], place[order]
    first = torch.ones_like(of_place, dtype=torch.bool)
    first[1:] = of_place[1:] != of_place[:-1]
    has_second = torch.zeros_like(first)
    has_second[:-1] = ~first[1:]
    second = torch.where(has_second, place.roll(-1), -1)
    row = rows[order // 2]
    key = tiles[rows].flatten()[order] * 64
    columns = (place, second, meta[row, 0], meta[row, 7], key)
    return SharedTiles(slots.int(), torch.stack([x[first] for x in columns], 1).int(), num_slots)


@with_fp_fusion
@triton.jit(do_not_specialize=["sequences", "s_k"])
def s2_attention_bwd_kernel_hopper_add_tiles(
    parts, sums, dk_ptr, dv_ptr, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, scale, sequences, s_k,
    D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add the sums of AT_ONCE keys, and store dk and dv."""
    CHUNKS: tl.constexpr = 64 // AT_ONCE
    SIZE: tl.constexpr = 64 * 2 * D
    program = tl.program_id(0)
    chunk = program % CHUNKS
    b = program // CHUNKS % sequences
    entry = sums + program // CHUNKS // sequences * _COLUMNS
    key = tl.load(entry + 4) + chunk * AT_ONCE
    row = tl.arange(0, AT_ONCE)
    at = (chunk * AT_ONCE + row)[:, None] * D + tl.arange(0, D)[None, :]
    dk = tl.zeros([AT_ONCE, D], tl.float32)
    dv = tl.zeros([AT_ONCE, D], tl.float32)
    for n in range(0, 2):
        place = tl.load(entry + n)
        part = parts + ((place // 2).to(tl.int64) * sequences + b) * (2 * SIZE) + place % 2 * SIZE
        dk += tl.load(part + at, mask=place >= 0, other=0.0)
        dv += tl.load(part + 64 * D + at, mask=place >= 0, other=0.0)
    kv = tl.load(entry + 2).to(tl.int64)
    b = (b + tl.load(entry + 3)).to(tl.int64)
    in_range = key + row < s_k
    store_tile(dk_ptr + b * dk_batch + kv * dk_head, key, dk_row, in_range, dk * scale, AT_ONCE, D, D)
    store_tile(dv_ptr + b * dv_batch + kv * dv_head, key, dv_row, in_range, dv, AT_ONCE, D, D)


def launch_of_tiles(
    parts: Tensor, sums: Tensor, dk: Tensor, dv: Tensor, scale: float
) -> tuple[int, tuple[object, ...]]:  # fmt: skip
    """Return the number of programs, and arguments.

    `dk` and `dv` are views [b, h, s, d]; `parts` is as `new_parts` made it.
    """
    sequences = parts.shape[1]
    arguments = (
        parts, sums, dk, dv, *strides(dk), *strides(dv), float(scale), sequences, dk.shape[2], dk.shape[3], _AT_ONCE,
    )  # fmt: skip
    return len(sums) * sequences * (64 // _AT_ONCE), arguments
