"""Block masks of any pattern over long sequences: in bits, and row by row."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from s2train.layouts.hybrid import LayerLayout
from s2train.layouts.patterns import Dense, Pattern

_MASK_ELEMENTS = 1 << 22  # of a mask that is looked at in one go


def mask_rows(pattern: Pattern, num_blocks: int, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """The mask in pieces of a multiple of rows: the first query block of each, and bool [rows, num_blocks]."""
    blocks = torch.arange(num_blocks)
    for query in blocks.split(max(1, _MASK_ELEMENTS // num_blocks // multiple) * multiple):
        yield int(query[0]), pattern.keep(query[:, None], blocks[None, :])


def packed_mask(pattern: Pattern, num_blocks: int) -> np.ndarray:
    """The mask as bits: uint64 [num_blocks, ceil(num_blocks / 64)]; `unpack` reads a row of it."""
    packed = np.zeros((num_blocks, -(-num_blocks // 64) * 8), dtype=np.uint8)
    for first, rows in mask_rows(pattern, num_blocks):
        bits = np.packbits(rows.numpy(), axis=1, bitorder="little")
        packed[first : first + len(bits), : bits.shape[1]] = bits
    return packed.view(np.uint64)


def unpack(bits: np.ndarray, num_blocks: int) -> np.ndarray:
    """Bool [..., num_blocks] of uint64 [..., words]."""
    return np.unpackbits(bits.view(np.uint8), axis=-1, count=num_blocks, bitorder="little").astype(bool)


def packed_unions(layers: Sequence[LayerLayout], num_blocks: int) -> list[np.ndarray | None]:
    """For each layer what its heads keep together, as `packed_mask`; None where that is every causal block.

    Layers of the same patterns share one array, and each pattern's mask is made once.
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
