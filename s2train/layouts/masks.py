"""Block masks over long sequences: packed bits and row pieces."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from s2train.layouts.patterns import Pattern

_MASK_ELEMENTS = 1 << 22  # mask elements evaluated at once


def mask_rows(pattern: Pattern, num_blocks: int, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yield the mask in pieces of rows.

    Each piece is its first query block and bool [rows, num_blocks]; the number of rows is a multiple of `multiple`.
    """
    blocks = torch.arange(num_blocks)
    for query in blocks.split(max(1, _MASK_ELEMENTS // num_blocks // multiple) * multiple):
        yield int(query[0]), pattern.keep(query[:, None], blocks[None, :])


def packed_mask(pattern: Pattern, num_blocks: int) -> np.ndarray:
    """Pack the mask into bits: uint64 [num_blocks, ceil(num_blocks / 64)].

    `unpack` reads a row of it.
    """
    packed = np.zeros((num_blocks, -(-num_blocks // 64) * 8), dtype=np.uint8)
    for first, rows in mask_rows(pattern, num_blocks):
        bits = np.packbits(rows.numpy(), axis=1, bitorder="little")
        packed[first : first + len(bits), : bits.shape[1]] = bits
    return packed.view(np.uint64)


def unpack(bits: np.ndarray, num_blocks: int) -> np.ndarray:
    """Unpack uint64 [..., words] to bool [..., num_blocks]."""
    return np.unpackbits(bits.view(np.uint8), axis=-1, count=num_blocks, bitorder="little").astype(bool)
