"""Pairs of 64-query and 64-key tiles that a static layout keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout

TILE = 64


@dataclass(frozen=True)
class KeptTiles:
    """Pairs of tiles that the query heads of a KV head keep.

    Tensors are int64 [pairs], one head's pairs after the other's.

    - ``member``: the head within its group of ``members``.
    - ``query``, ``key``: tiles.
    """

    member: Tensor
    query: Tensor
    key: Tensor
    members: int

    def at(self, chosen: Tensor) -> KeptTiles:
        """Return the pairs that a mask chooses."""
        return KeptTiles(self.member[chosen], self.query[chosen], self.key[chosen], self.members)

    def of_larger_tiles(self, tiles: int, num_queries: int, num_keys: int) -> KeptTiles:
        """Return the larger query tiles with any of their `tiles` tiles kept.

        There are `num_queries` query tiles and `num_keys` key tiles.
        """
        code = torch.unique((self.member * num_queries + self.query // tiles) * num_keys + self.key)
        row = code // num_keys
        return KeptTiles(row // num_queries, row % num_queries, code % num_keys, self.members)


def kept_tiles_of_group(
    layout: BlockLayout, group: tuple[int, ...], first_tile: int, end_tile: int, s_k: int, causal: bool
) -> KeptTiles:
    """Return the tiles that heads with the patterns of `group` keep.

    Query tiles are in [first_tile, end_tile).
    """
    n_k, device = layout.num_key_blocks, layout.device
    bounds = layout.column_offsets[::n_k].tolist()
    counts = torch.cat([layout.column_offsets[p * n_k : (p + 1) * n_k + 1].diff() for p in group]).long()
    rows = torch.cat([layout.column_rows[bounds[p] : bounds[p + 1]] for p in group]).long()
    line = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=len(rows))
    within = torch.arange(layout.block_size // TILE, device=device)
    query = rows[:, None, None] * len(within) + within[:, None]
    key = (line % n_k)[:, None, None] * len(within) + within
    found = torch.broadcast_tensors((line // n_k)[:, None, None], query, key)
    member, query, key = (x.flatten() for x in found)
    keep = (query >= first_tile) & (query < end_tile) & (key * TILE < s_k)
    if causal:
        keep &= query >= key
    return KeptTiles(member, query, key, len(group)).at(keep)
