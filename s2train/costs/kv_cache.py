"""KV cache size while decoding.

Key blocks are freed right after their last use. While position t is decoded, a KV head's key block j is live if some
query head of its group keeps it for the query block of t or a later one of the sequence. Counts are exact for sequences
of a known length: near its end fewer blocks are live than if it continued. If the data decide what is read, a key is
live as long as some query may read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.layouts.masks import mask_rows
from s2train.layouts.patterns import BandedPattern, Dense, DistancePattern, Pattern, Span


def last_queries(pattern: Pattern, num_blocks: int) -> Tensor:
    """Return the last query block that keeps each key block: int64 [num_blocks]."""
    key = torch.arange(num_blocks)
    last = key.clone()
    if isinstance(pattern, BandedPattern):
        starts = [0, *pattern.limits]
        for band, (start, stop) in enumerate(zip(starts, [*pattern.limits, num_blocks], strict=True)):
            within = pattern.columns(band, key) & (key + start < num_blocks)
            last = torch.where(within, (key + stop - 1).clamp(max=num_blocks - 1), last)
    elif isinstance(pattern, DistancePattern):
        farthest = torch.where(pattern.distances(key), key, 0).cummax(0).values  # largest kept distance up to each one
        last += farthest.flip(0)
    elif isinstance(pattern, Span):
        # A block leaves the window once: the last query that keeps it is before the first one that doesn't.
        farthest = (key - pattern.window(key)).clamp(min=-1)  # the last block before each query's window
        last = torch.searchsorted(farthest.cummax(0).values, key) - 1
        last = torch.where(key < pattern.sinks, num_blocks - 1, last)
    else:
        for first, rows in mask_rows(pattern, num_blocks):
            query = torch.arange(first, first + len(rows))[:, None]
            last = torch.maximum(last, (rows * query).amax(0))
    return last


def live_blocks(heads: Iterable[Pattern], num_blocks: int) -> Tensor:
    """Count a KV head's live key blocks for each query block.

    The result is int64 [num_blocks].

    Args:
        heads: the query heads of its group.
    """
    last = torch.stack([last_queries(head, num_blocks) for head in dict.fromkeys(heads)]).amax(0)
    freed = torch.bincount(last + 1, minlength=num_blocks + 1)[:num_blocks]
    return (1 - freed).cumsum(0)


@dataclass(frozen=True)
class CacheTokens:
    """Cached tokens (key and value), summed over KV heads and layers.

    Attributes:
        peak: the maximum while any position is decoded.
        end: when the last position is decoded.
        read: read by the last position: the least that decoding it loads.
        dense: held at the end by the same number of dense heads.
    """

    peak: int
    end: int
    read: int
    dense: int

    def nbytes(self, tokens: int, head_dim: int, element_size: int = 2) -> int:
        """Return bytes of cached tokens, key and value.

        Two bytes per element for bf16.
        """
        return 2 * head_dim * element_size * tokens


def cache_tokens(layer: LayerLayout, num_query_groups: int, seq_length: int) -> CacheTokens:
    """Count what one layer's KV cache holds over `seq_length` tokens.

    Query heads form equal groups.
    """
    return _sum_over_time([layer], num_query_groups, seq_length)


def model_cache_tokens(hybrid: HybridLayout, seq_length: int) -> CacheTokens:
    """Count what the KV caches of all layers hold.

    The peak is of their sum.
    """
    return _sum_over_time(hybrid.layers, hybrid.num_query_groups, seq_length)


def _sum_over_time(layers: Iterable[LayerLayout], num_query_groups: int, seq_length: int) -> CacheTokens:
    of_group: dict[tuple[frozenset[Pattern], int], tuple[Tensor, int]] = {}
    held, read, dense = torch.zeros(1, dtype=torch.int64), 0, 0
    for layer in layers:
        size = len(layer.bound) // num_query_groups
        for first in range(0, len(layer.bound), size):
            group = frozenset(layer.bound[first : first + size])
            if any(isinstance(head, Dense) for head in group):
                group = frozenset([Dense()])
            if (group, layer.block_size) not in of_group:
                of_group[group, layer.block_size] = _tokens(group, layer, seq_length)
            tokens, last_row = of_group[group, layer.block_size]
            held = held + tokens
            read += last_row
            dense += seq_length
    return CacheTokens(int(held.max()), int(held[-1]), read, dense)


def _tokens(group: frozenset[Pattern], layer: LayerLayout, seq_length: int) -> tuple[Tensor, int]:
    """Count the tokens that a KV head's cache holds and reads.

    The first result, int64 [num_blocks], counts tokens held at the end of each query block; the second, those that the
    last position reads.
    """
    num_blocks = layer.num_blocks(seq_length)
    newest = torch.full((num_blocks,), layer.block_size)
    newest[-1] = seq_length - (num_blocks - 1) * layer.block_size
    # The newest block is always live; the others are complete.
    held = (live_blocks(group, num_blocks) - 1) * layer.block_size + newest
    kept = int(_last_row(group, num_blocks).sum()) - 1
    return held, kept * layer.block_size + int(newest[-1])


def _last_row(group: frozenset[Pattern], num_blocks: int) -> Tensor:
    key, last = torch.arange(num_blocks), torch.tensor(num_blocks - 1)
    return torch.stack([head.keep(last, key) for head in group]).any(0)
