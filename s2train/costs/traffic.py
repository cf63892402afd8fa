"""Bytes that attention moves between GPU memory and chip.

Gives two counts: a lower bound, and what the kernels stream. The lower bound touches each tensor once. The streaming
estimate counts every load and store of the Hopper kernels, as if no tile stayed in a cache; whatever the L2 cache
serves reduces it.

forward (`kernels/hopper/forward.py`)   a tile of 128 queries of one head: q, out and the log-sum-exps once; key and
    value of every block that any of its queries keeps.
backward (`kernels/hopper/backward.py`) first out and dout are read, delta is written, float32 sums of dq are cleared;
    then a program holds 128 keys and values and iterates over the 64-query tiles of all heads of its group that keep
    them: q, dout, log-sum-exps and deltas are read, dq is read and written in float32; dk and dv are written once;
    last, dq is read and written in the model's dtype. In blocks of 64 a program holds two blocks that similar queries
    keep, and loads those queries once. Here each block counts separately, up to twice what is loaded. Float32 sums of
    key tiles that several programs share are not counted.
Blocks under 64 tokens use portable kernels. They are assumed to load as those for blocks of 64 do, one block
a tile.
"""

import bisect
import itertools
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.masks import mask_rows
from s2train.layouts.patterns import BandedPattern, DistancePattern, Pattern

_TILE = 128  # queries of a forward tile, keys of a backward program
_FLOAT = 4  # bytes of the log-sum-exps, deltas and sums
_ELEMENT = 2  # bytes of all else: bf16


@dataclass(frozen=True)
class Traffic:
    """Bytes of one layer's attention over one sequence.

    Attributes:
        forward_least, backward_least: every tensor read or written once.
        forward, backward: loads and stores of the kernels, without caches.
    """

    forward_least: int
    backward_least: int
    forward: int
    backward: int


def sum_traffic(parts: Iterable[Traffic]) -> Traffic:
    """Add up the traffic of several layers."""
    return Traffic(*(sum(column) for column in zip(*map(astuple, parts), strict=True)))


def attention_traffic(layer: LayerLayout, num_query_groups: int, seq_length: int, head_dim: int) -> Traffic:
    """Count bytes moved by one layer's attention over one sequence, in bf16."""
    heads, groups = len(layer.heads), num_query_groups
    query = heads * seq_length * head_dim * _ELEMENT  # one tensor of q's shape
    key = groups * seq_length * head_dim * _ELEMENT
    rows = heads * seq_length * _FLOAT
    sums = heads * seq_length * head_dim * _FLOAT
    walked = {pattern: _walked(pattern, layer, seq_length) for pattern in set(layer.heads)}
    keys_loaded = sum(walked[head][0] for head in layer.heads)
    queries_loaded = sum(walked[head][1] for head in layer.heads)
    # q, out, log-sum-exps; in the backward also dout and dq, key and value and their gradients
    forward_least = 2 * query + 2 * key + rows
    backward_least = 4 * query + 4 * key + rows
    row_bytes = head_dim * _ELEMENT
    prepare = 2 * query + rows + sums
    main = queries_loaded * (2 * row_bytes + 2 * _FLOAT + 2 * head_dim * _FLOAT) + 4 * key
    finish = sums + query
    return Traffic(
        forward_least=forward_least,
        backward_least=backward_least,
        forward=2 * query + rows + keys_loaded * 2 * row_bytes,
        backward=prepare + main + finish,
    )


def _walked(pattern: Pattern, layer: LayerLayout, seq_length: int) -> tuple[int, int]:
    """Count keys loaded by forward tiles, and queries loaded by backward tiles.

    The counts are for one head and whole tiles.
    """
    num_blocks, size = layer.num_blocks(seq_length), layer.block_size
    kept = kept_key_blocks([pattern], num_blocks)
    pairs = int(kept.sum())
    if size < _TILE:
        seen = pairs if 2 * size < _TILE else int(_seen_in_twos(pattern, kept).sum())
        return seen * size, pairs * size
    # Tiles of the diagonal block skip keys after the query, or queries before the key.
    tiles = size // _TILE
    loaded = ((pairs - num_blocks) * tiles**2 + num_blocks * tiles * (tiles + 1) // 2) * _TILE
    return loaded, loaded


def _seen_in_twos(pattern: Pattern, kept: Tensor) -> Tensor:
    """Count key blocks that query block 2t or 2t + 1 keeps.

    The result is int64 [ceil(n / 2)].

    Args:
        kept: int64 [n], the number that each query block keeps.
    """
    num_blocks = len(kept)
    key = torch.arange(num_blocks)
    second = key[1::2]
    if isinstance(pattern, BandedPattern):
        # Relative to the second query block: its own bands, and those of the first, one block farther away.
        starts = [0, *(start for start in pattern.limits if start < num_blocks)]
        cuts = sorted({*starts, *(start + 1 for start in starts), num_blocks})
        seen = torch.zeros_like(second)
        for start, stop in itertools.pairwise(cuts):
            columns = pattern.columns(bisect.bisect_right(pattern.limits, start), key)
            if start > 0:
                columns |= pattern.columns(bisect.bisect_right(pattern.limits, start - 1), key)
            before = torch.cat([torch.zeros(1, dtype=torch.int64), columns.cumsum(0)])
            seen += before[(second - start + 1).clamp(min=0)] - before[(second - stop + 1).clamp(min=0)]
    elif isinstance(pattern, DistancePattern):
        distances = pattern.distances(key)
        distances[1:] |= distances[:-1].clone()
        seen = distances.cumsum(0)[second]
    else:
        parts = [rows[: len(rows) // 2 * 2].view(-1, 2, num_blocks) for _, rows in mask_rows(pattern, num_blocks, 2)]
        seen = torch.cat([part.any(1).sum(1) for part in parts])
    return torch.cat([seen, kept[-1:]]) if num_blocks % 2 else seen
