"""Chooses how context parallel ranks exchange keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from s2train.attention.kind import LayerLayout
from s2train.config import ParallelConfig
from s2train.layouts.counting import touched_key_blocks

# Of a gather's bytes. Forward and backward of attention at 128k tokens with blocks, over gather: on four H200s
# (launch/results/2026-11-29-h200x4-exchange.json) 0.60 to 0.97 for six layers that exchange 2 to 21 % of the bytes,
# 0.98 at 26 %, 1.01 at 31 %, 1.03 at 38 % and 1.11 at 75 %. On two H100s (2026-11-26-h100x2-cp-bytes.json) 0.81 to 0.97
# up to 21 %, 1.18 at 38 % and 1.02 at 75 %. The limit is the middle of 26 and 31 %.
# On other H200s, after keys and values were exchanged as one tensor (2026-11-29-h200x4-cp-bytes.json), 0.68 to 0.94 up
# to 11 %, 0.99 to 1.02 at 20 to 26 %, 1.03 at 31 % and 1.09 at 38 %.
AUTO_LIMIT = 0.28


@dataclass(frozen=True)
class LayerExchange:
    """How a layer's context parallel ranks get keys and values.

    Attributes:
        letter: of the layer.
        mode: blocks, overlapped or gather.
        share: of a gather's bytes that blocks move.
        is_chosen: whether `parallel.cp_exchange=auto` chose the mode.
    """

    letter: str
    mode: str
    share: float
    is_chosen: bool

    def format(self) -> str:
        """Format one line."""
        why = f"; auto takes blocks up to {AUTO_LIMIT:.0%}" if self.is_chosen else ""
        return f"{self.letter}: {self.mode}; blocks are {self.share:.1%} of a gather's bytes{why}"


def exchange_mode(layer: LayerLayout, num_query_groups: int, seq_length: int, parallel: ParallelConfig) -> str:
    """Return a layer's exchange: blocks, overlapped or gather.

    The choice of `parallel.cp_exchange=auto` depends on settings alone, so that all ranks make the same.
    """
    if parallel.cp_exchange != "auto":
        return parallel.cp_exchange
    if parallel.cp == 1 or not _exchanges(layer):
        return "gather"
    return "blocks" if exchanged_share(layer, num_query_groups, seq_length, parallel.cp) <= AUTO_LIMIT else "gather"


def layer_exchanges(
    layers: Sequence[LayerLayout], num_query_groups: int, seq_length: int, parallel: ParallelConfig
) -> tuple[LayerExchange, ...]:
    """Return the distinct exchanges of a model's layers, in order of appearance.

    Layers that always gather are left out: dense ones, and those whose data choose what is read.
    """
    if parallel.cp == 1:
        return ()
    found = (
        LayerExchange(
            layer.kind.letter,
            exchange_mode(layer, num_query_groups, seq_length, parallel),
            exchanged_share(layer, num_query_groups, seq_length, parallel.cp),
            parallel.cp_exchange == "auto",
        )
        for layer in dict.fromkeys(layers)
        if _exchanges(layer)
    )
    return tuple(dict.fromkeys(found))


def _exchanges(layer: LayerLayout) -> bool:
    return layer.is_static and not layer.is_dense


@lru_cache(maxsize=256)
def exchanged_share(layer: LayerLayout, num_query_groups: int, seq_length: int, cp: int) -> float:
    """Return the share of a gather's blocks that `cp` ranks exchange.

    A rank needs a block of a KV head if any of its queries keeps it in any head of the group. All heads of the layer
    count, also those of other tensor parallel ranks. A sequence counts as one document.
    """
    num_blocks, size = layer.num_blocks(seq_length), len(layer.heads) // num_query_groups
    bounds = [num_blocks * chunk // (2 * cp) for chunk in range(2 * cp + 1)]
    groups = [frozenset(layer.heads[first : first + size]) for first in range(0, len(layer.heads), size)]
    moved = 0
    for group in set(groups):
        for rank in range(cp):
            needed, own = torch.zeros(2, num_blocks, dtype=torch.bool)
            for chunk in (rank, 2 * cp - 1 - rank):  # Megatron's zig-zag
                first, stop = bounds[chunk : chunk + 2]
                needed |= touched_key_blocks(group, num_blocks, first, stop)
                own[first:stop] = True
            moved += groups.count(group) * int((needed & ~own).sum())
    return moved / (num_query_groups * num_blocks * (cp - 1))
