"""Settings of one attention call, and tensor formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Format = Literal["sbhd", "bshd", "bhsd"]
FORMATS: tuple[str, ...] = get_args(Format)

# permutation of a tensor in this format to [b, h, s, d]; and the inverse
_TO_BHSD = {"sbhd": (1, 2, 0, 3), "bshd": (0, 2, 1, 3), "bhsd": (0, 1, 2, 3)}
_FROM_BHSD = {"sbhd": (2, 0, 1, 3), "bshd": (0, 2, 1, 3), "bhsd": (0, 1, 2, 3)}


@dataclass(frozen=True)
class AttentionSpec:
    """Settings of a call besides its tensors and layout; see `block_sparse_attention`."""

    softmax_scale: float
    causal: bool
    query_offset: int
    cu_seqlens: Tensor | None
    format: Format
    portable: bool = False  # never use kernels for one kind of GPU
    split_columns: bool = True  # let several programs compute dk and dv of a key block that many queries keep


def to_bhsd(x: Tensor, format: Format) -> Tensor:
    """Return a view [b, h, s, d] of a tensor in `format`."""
    return x.permute(_TO_BHSD[format])


def shape_bhsd(x: Tensor, format: Format) -> tuple[int, int, int, int]:
    """Return the shape of `to_bhsd`'s view without making the view.

    A call needs the shape several times.
    """
    b, h, s, d = _TO_BHSD[format]
    shape = x.shape
    return shape[b], shape[h], shape[s], shape[d]


def from_bhsd(x: Tensor, format: Format) -> Tensor:
    """Return a view in `format` of a tensor [b, h, s, d]."""
    return x.permute(_FROM_BHSD[format])


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a kernel output; tests poison it to find unwritten elements."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_bhsd(shape: tuple[int, int, int, int], like: Tensor, format: Format) -> Tensor:
    """Allocate a tensor [b, h, s, d], contiguous in `format`."""
    return to_bhsd(empty(in_format(shape, format), like.dtype, like.device), format)


def in_format(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Return the shape in `format` of a tensor [b, h, s, d]."""
    return tuple(shape[i] for i in _FROM_BHSD[format])
