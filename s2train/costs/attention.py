"""What a layout costs, counted exactly from the positions that its heads keep."""

from functools import lru_cache

import torch

from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.hybrid import HybridLayout, LayerLayout
from s2train.layouts.patterns import Pattern


@lru_cache(maxsize=256)  # a plan asks for FLOPs, density and shares of the same layers
def kept_positions(layer: LayerLayout, seq_length: int) -> tuple[int, ...]:
    """Kept causal (query, key) token pairs of every head.

    Diagonal blocks are triangular, and the last block may be partial.
    """
    of_pattern = {pattern: _kept_positions(pattern, layer, seq_length) for pattern in set(layer.heads)}
    return tuple(of_pattern[head] for head in layer.heads)


def _kept_positions(pattern: Pattern, layer: LayerLayout, seq_length: int) -> int:
    num_blocks = layer.num_blocks(seq_length)
    blocks = torch.arange(num_blocks)
    rows = torch.full((num_blocks,), layer.block_size)
    rows[-1] = seq_length - (num_blocks - 1) * layer.block_size
    diagonal = pattern.keep(blocks, blocks).long()
    # Only the last block can be partial, and as a key block it is met on the diagonal alone.
    before = (kept_key_blocks([pattern], num_blocks) - diagonal) * layer.block_size
    return int((rows * before + diagonal * (rows * (rows + 1) // 2)).sum())


def layout_nbytes(layer: LayerLayout, seq_length: int) -> int:
    """Bytes of the layer's `BlockLayout`: int32 CSR and CSC of distinct patterns, and one index a head."""
    num_blocks, distinct = layer.num_blocks(seq_length), set(layer.heads)
    kept = sum(int(kept_key_blocks([pattern], num_blocks).sum()) for pattern in distinct)
    return 4 * (len(layer.heads) + 2 * (len(distinct) * num_blocks + 1 + kept))


def density(layout: LayerLayout | HybridLayout, seq_length: int) -> float:
    """Kept positions over causal positions, s (s + 1) / 2; the mean over heads, and over layers."""
    if isinstance(layout, HybridLayout):
        of_layer = {layer: density(layer, seq_length) for layer in set(layout.layers)}
        return sum(of_layer[layer] for layer in layout.layers) / len(layout.layers)
    kept = kept_positions(layout, seq_length)
    return sum(kept) / (len(kept) * (seq_length * (seq_length + 1) // 2))


def rank_spread(layer: LayerLayout, seq_length: int, tp: int) -> float:
    """The busiest of `tp` tensor parallel ranks' kept positions over the mean, less 1: the others wait for it."""
    kept = kept_positions(layer, seq_length)
    size = len(kept) // tp
    ranks = [sum(kept[rank * size : (rank + 1) * size]) for rank in range(tp)]
    return max(ranks) * tp / sum(ranks) - 1


def attention_flops(layer: LayerLayout, seq_length: int, head_dim: int) -> int:
    """FLOPs of one sequence's forward pass: Q Kᵀ and P V take 2 head_dim each per kept position and head."""
    return 4 * head_dim * sum(kept_positions(layer, seq_length))
