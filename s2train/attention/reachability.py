"""Counts the layers that carry information from one position to another.

A layer passes to query position i what is at every position j <= i that any of its heads keeps; what i holds already
stays there (the residual stream). So information goes from key to query by hops backwards in the graph of kept blocks,
at most one hop a layer, and may wait in place through any layer.

Only layouts whose layers are all static have a reach: where the data choose, it isn't known before (TypeError).

Counting by blocks is exact for tokens: every token of a query block keeps the same earlier key blocks, whole, and of
its own block the tokens up to itself. So all keys of an earlier block arrive together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.errors import ConfigError, from_to
from s2train.layouts.masks import packed_mask, unpack
from s2train.layouts.patterns import Dense, Pattern

NEVER = -1


@dataclass(frozen=True)
class Reach:
    """How many layers carry each key block to one query position.

    The counts are int64 [num_blocks] on the CPU; -1 (NEVER): the block can't arrive. A count holds for all tokens of
    the block up to the query, except the query itself, which needs no layer. Blocks after the query's are NEVER; its
    own block is 0 where no other token comes before the query in it.

    Attributes:
        query: position in tokens.
        from_first: layers to go through, from the model's first on, until the query can hold the key.
        from_last: how many of the last layers carry the key to the query: the model's receptive field, from its output.
    """

    query: int
    block_size: int  # tokens
    num_layers: int
    from_first: Tensor
    from_last: Tensor

    def layers_from_first(self, key: int) -> int | None:
        """Return how many first layers carry position `key` to the query.

        None: the query can never hold it.
        """
        return self._of(self.from_first, key)

    def layers_from_last(self, key: int) -> int | None:
        """Return how many last layers carry position `key` to the query.

        None: not even all layers together do.
        """
        return self._of(self.from_last, key)

    def _of(self, counts: Tensor, key: int) -> int | None:
        if key == self.query:
            return 0
        if not 0 <= key < self.query:
            return None
        count = int(counts[key // self.block_size])
        return None if count == NEVER else count


def reach(hybrid: HybridLayout, seq_length: int, query: int | None = None) -> Reach:
    """Count, exactly, the layers that carry each block to position `query`.

    From each layer downwards, it computes the set of reached blocks step by step, as rows of bits: at most L² / 2 steps
    of n² / 64 words.

    Args:
        query: position in tokens; None: the last.

    Raises:
        ConfigError: no such position in a sequence of `seq_length` tokens.
    """
    query = seq_length - 1 if query is None else query
    if not 0 <= query < seq_length:
        raise ConfigError("query", query, f"no position of {seq_length} tokens", f"Use {from_to(0, seq_length - 1)}.")
    own = query // hybrid.block_size
    count = own + 1  # later blocks can't be seen
    unions = _packed_unions(hybrid.layers, count)
    from_first = np.full(-(-seq_length // hybrid.block_size), NEVER, dtype=np.int64)
    from_first[own] = int(query % hybrid.block_size > 0)
    from_last = from_first.copy()
    for top in reversed(range(len(hybrid.layers))):
        reached = np.zeros(count, dtype=bool)
        reached[own] = True
        for used, layer in enumerate(range(top, -1, -1), start=1):
            reached = _step(reached, unions[layer])
            if top == len(hybrid.layers) - 1:
                known = from_last[:count]
                known[reached & (known == NEVER)] = used
            if reached.all():
                break  # more layers below carry no less
        first = from_first[:count]
        first[reached & (np.arange(count) != own)] = top + 1
    return Reach(
        query, hybrid.block_size, len(hybrid.layers), torch.from_numpy(from_first), torch.from_numpy(from_last)
    )


def direct_heads(hybrid: HybridLayout, query: int, keys: Sequence[int]) -> int:
    """Count the query heads that see all `keys` in one hop.

    The heads are those of all layers, at position `query`; `keys` are positions. A key that few layers can carry may
    arrive through few heads, which alone must then have learned to look it up.
    """
    at = torch.tensor(query // hybrid.block_size)
    blocks = torch.tensor(sorted({key // hybrid.block_size for key in keys}))
    return sum(count for head, count in hybrid.heads.items() if bool(head.keep(at, blocks).all()))


def _step(reached: np.ndarray, union: np.ndarray | None) -> np.ndarray:
    """Return the blocks reached after one more layer: bool [n].

    They are the blocks in `reached`, and all that these see in the layer.

    Args:
        union: what the layer sees; None: every causal block.
    """
    if union is None:
        return np.arange(len(reached)) <= reached.nonzero()[0].max()
    return unpack(np.bitwise_or.reduce(union[reached], axis=0), len(reached)) | reached


def _packed_unions(layers: Sequence[LayerLayout], num_blocks: int) -> list[np.ndarray | None]:
    """Return what each layer's heads keep together, as `packed_mask`.

    None stands for every causal block. Layers of the same patterns share one array, and each pattern's mask is made
    once.
    """
    of_layer = [frozenset(layer.heads) for layer in layers]
    unions: dict[frozenset[Pattern], np.ndarray | None] = {
        heads: None if _has_dense(heads) else np.zeros((num_blocks, -(-num_blocks // 64)), dtype=np.uint64)
        for heads in of_layer
    }
    for pattern in dict.fromkeys(head for heads, union in unions.items() if union is not None for head in heads):
        mask = packed_mask(pattern, num_blocks)
        for heads, union in unions.items():
            if union is not None and pattern in heads:
                union |= mask
    return [unions[heads] for heads in of_layer]


def _has_dense(heads: Iterable[Pattern]) -> bool:
    return any(isinstance(head, Dense) for head in heads)


@dataclass(frozen=True)
class DistanceRow:
    """Keys at distances from `nearest` to `farthest` tokens before the query.

    Attributes:
        within: share of them that arrives through the last 1, 2, … layers; the last entry: through all.
    """

    nearest: int
    farthest: int
    within: tuple[float, ...]


def distance_table(found: Reach) -> tuple[DistanceRow, ...]:
    """Tabulate the shares of keys that arrive, by distance and layers.

    A row is for distances of 1 token, 2 to 3, 4 to 7, …; it has the shares that arrive through the last 1, 2, … layers.
    Layers are counted as in `Reach.from_last`, up to the number that the slowest of the arriving keys needs.
    """
    distances = torch.arange(1, found.query + 1)
    layers = found.from_last[(found.query - distances) // found.block_size]
    most = max(1, int(layers.max())) if len(layers) else 1
    rows = []
    for nearest in (1 << power for power in range(found.query.bit_length())):
        part = layers[nearest - 1 : 2 * nearest - 1]
        within = tuple(float(((part != NEVER) & (part <= count)).double().mean()) for count in range(1, most + 1))
        rows.append(DistanceRow(nearest, min(2 * nearest - 1, found.query), within))
    return tuple(rows)
