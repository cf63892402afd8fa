"""Masks from a file.

The .npz file holds, for each layer that reads it, an array ``layer_N`` (N counts the model's layers from 0): bool
[heads, n, n], True where query block i keeps key block j; causal, with the diagonal. Sequences may have up to n
blocks. ``block_size`` is an integer, in tokens.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from s2train.errors import ConfigError, message_line
from s2train.files import UNREADABLE_ARRAYS
from s2train.layouts.patterns.base import HeadPatterns, LayerContext, Pattern, PatternError


@dataclass(frozen=True)
class MaskPattern(Pattern):
    """Pattern from a mask of n × n blocks.

    Equal masks are equal patterns.

    Raises on use:
        ConfigError: a block is beyond the mask.
    """

    file: str
    num_blocks: int
    digest: bytes
    bits: Tensor = field(compare=False, repr=False)  # uint8 [n, ceil(n / 8)], key block j in bit j % 8 of byte j // 8
    never_returns: bool = field(compare=False)  # kv_efficient
    setting: str = field(compare=False)  # that named the file, for errors

    @classmethod
    def of(cls, mask: np.ndarray, file: str, setting: str) -> "MaskPattern":
        """Make a pattern from a bool mask [n, n].

        The mask must be causal, with the diagonal.
        """
        bits = np.packbits(mask, axis=1, bitorder="little")
        dropped = ~mask & np.tri(len(mask), dtype=bool)
        returning = mask[1:] & dropped[:-1]
        digest = hashlib.blake2b(bits.tobytes(), digest_size=16).digest()
        return cls(file, len(mask), digest, torch.from_numpy(bits), not returning.any(), setting)

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        for blocks in (query, key):
            if blocks.numel():
                self.check_length(int(blocks.max()) + 1)
        bits = self.bits.to(query.device)
        return (bits[query, key >> 3] >> (key & 7).to(torch.uint8)) & 1 == 1

    def check_length(self, num_blocks: int) -> None:
        """Raise ConfigError if a sequence of `num_blocks` is longer than the mask."""
        if num_blocks > self.num_blocks:
            problem = f"its masks end at {self.num_blocks} blocks, and the sequence has {num_blocks}"
            remedy = "Write masks of that many blocks, or shorten the sequence."
            raise ConfigError(f"{self.setting}.file", self.file, problem, remedy)

    @property
    def kv_efficient(self) -> bool:
        return self.never_returns

    def form(self) -> str:
        return f"masks of {self.file}"

    def describe(self) -> str:
        return f"{self.form()} ({self.digest.hex()[:8]})"


def known_blocks(heads: Iterable[Pattern], most: int) -> int:
    """Return the most blocks that all heads cover, up to `most`.

    The smallest mask from a file limits it.
    """
    return min([most, *(head.num_blocks for head in heads if isinstance(head, MaskPattern))])


def file_heads(file: str) -> HeadPatterns:
    """Return heads with the masks of an .npz file.

    The file has this module's format.

    Raises, when a layer requests its heads:
        PatternError: the file doesn't exist, has another format, or its masks don't fit the model.
    """

    def heads(layer: LayerContext) -> tuple[MaskPattern, ...]:
        masks = _read(file, layer)
        return tuple(MaskPattern.of(mask, file, layer.setting) for mask in masks)

    return heads


def write_masks(file: Path, masks: Mapping[int, np.ndarray], block_size: int) -> None:
    """Write the masks, bool [heads, n, n], of layers by their number."""
    arrays = {f"layer_{number}": np.asarray(mask, dtype=bool) for number, mask in masks.items()}
    np.savez_compressed(file, block_size=np.int64(block_size), **arrays)  # type: ignore[arg-type]


def _read(file: str, layer: LayerContext) -> np.ndarray:
    name = f"layer_{layer.layer}"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if "block_size" not in arrays or name not in arrays:
                lacking = "block_size" if "block_size" not in arrays else name
                problem = f"has {', '.join(arrays.files) or 'nothing'}, and no {lacking}"
                raise PatternError("file", file, problem, f"Add an array {lacking} to it.")
            block_size, masks = int(arrays["block_size"]), arrays[name]
    except UNREADABLE_ARRAYS as error:
        if isinstance(error, PatternError):
            raise
        problem = (
            "there is no such file"
            if isinstance(error, FileNotFoundError)
            else f"no .npz of arrays ({message_line(error)})"
        )
        remedy = "Name an .npz written by s2train.layouts.patterns.file.write_masks."
        raise PatternError("file", file, problem, remedy) from error
    if block_size != layer.block_size:
        problem = f"made for blocks of {block_size} tokens, and layout.block_size is {layer.block_size}"
        raise PatternError("file", file, problem, f"Set layout.block_size={block_size}.")
    _check(file, name, masks, layer.num_heads)
    return masks


def _check(file: str, name: str, masks: np.ndarray, num_heads: int) -> None:
    def error(problem: str, remedy: str) -> PatternError:
        return PatternError("file", file, f"{name} {problem}", remedy)

    if masks.dtype != np.bool_:
        raise error(f"is {masks.dtype}", "Save bool masks, True where a block is kept.")
    if masks.ndim != 3 or masks.shape[0] != num_heads or masks.shape[1] != masks.shape[2] or 0 in masks.shape:
        raise error(f"has shape {list(masks.shape)}", f"Save [{num_heads} heads, n query blocks, n key blocks].")
    if np.triu(masks, 1).any():
        head, query, key = np.argwhere(np.triu(masks, 1))[0].tolist()
        problem = f"keeps key block {key} for query block {query} of head {head}: not causal"
        raise error(problem, "Clear what lies above the diagonal (numpy.tril).")
    if not masks.diagonal(axis1=1, axis2=2).all():
        head, query = np.argwhere(~masks.diagonal(axis1=1, axis2=2))[0].tolist()
        raise error(f"drops query block {query}'s own key block in head {head}", "Keep the whole diagonal.")
