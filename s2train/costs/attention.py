"""Cost of a layout, from the positions that its heads keep.

The kind of attention reports these positions.
"""

from functools import lru_cache

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.layouts.counting import kept_key_blocks


@lru_cache(maxsize=256)  # a plan needs FLOPs, density and balance of the same layers
def kept_positions(layer: LayerLayout, seq_length: int) -> tuple[float, ...]:
    """Count each head's kept causal (query, key) token pairs.

    Some kinds give expected numbers.
    """
    return layer.kind.kept_positions(layer, seq_length)


def layout_nbytes(layer: LayerLayout, seq_length: int) -> int:
    """Return bytes of the layer's `BlockLayout`.

    These are int32 CSR and CSC of its distinct patterns, and one index per head.
    """
    num_blocks, distinct = layer.num_blocks(seq_length), set(layer.heads)
    kept = sum(int(kept_key_blocks([pattern], num_blocks).sum()) for pattern in distinct)
    return 4 * (len(layer.heads) + 2 * (len(distinct) * num_blocks + 1 + kept))


def density(layout: LayerLayout | HybridLayout, seq_length: int) -> float:
    """Return kept positions over causal positions, the mean over heads and layers.

    There are s (s + 1) / 2 causal positions.
    """
    if isinstance(layout, HybridLayout):
        of_layer = {layer: density(layer, seq_length) for layer in set(layout.layers)}
        return sum(of_layer[layer] for layer in layout.layers) / len(layout.layers)
    kept = kept_positions(layout, seq_length)
    return sum(kept) / (len(kept) * (seq_length * (seq_length + 1) // 2))


def rank_spread(layer: LayerLayout, seq_length: int, tp: int) -> float:
    """Return how far the busiest tensor parallel rank is above the mean.

    Computes its kept positions over the mean, minus 1: the other ranks wait for it.
    """
    kept = kept_positions(layer, seq_length)
    size = len(kept) // tp
    ranks = [sum(kept[rank * size : (rank + 1) * size]) for rank in range(tp)]
    return max(ranks) * tp / sum(ranks) - 1


def attention_flops(layer: LayerLayout, seq_length: int, head_dim: int) -> float:
    """Return forward FLOPs of one sequence's attention.

    Q Kᵀ and P V each take 2 head_dim FLOPs per kept position and head.
    """
    return 4 * head_dim * sum(kept_positions(layer, seq_length))
