"""Choose the kernels: Gluon's for Hopper where possible, else portable Triton."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from ..spec import AttentionSpec
from ..topk_layout import Layout, TopKLayout
from .backward_schedule import MAX_GROUP, QUERY_BITS
from .topk_forward_schedule import MAX_SLOTS

PANEL = 64  # elements of a head dimension that one swizzled TMA box holds
_BLOCKS = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# Gluon is experimental and changes with every release. Listed are releases in which the kernels ran on a GPU and agreed
# with the oracle.
TRITON = ("3.6.", "3.7.", "3.8.", "3.9.")
_LENGTH = 2**30  # positions, in 32-bit numbers
_INDICES = 2**31
_ALIGNMENT = 16  # bytes: alignment of addresses and strides in TMA descriptors
_MAX_STRIDE = 2**40  # bytes: limit of strides in TMA descriptors
_BACKWARD_TILE = 64
# dtype and head dimension; float16 at 128 spills 32 bytes of registers per thread
_BACKWARD_KINDS = frozenset((dtype, dim) for dtype in _DTYPES for dim in (64, 128))

Choice = Literal["hopper", "triton"]


def kernel_choice(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> Choice:
    """Choose the forward kernel.

    Q, k and v are views [b, h, s, d].
    """
    return "hopper" if is_hopper(q.device) and hopper_forward_supported(q, k, v, layout, spec) else "triton"


def backward_choice(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> Choice:
    """Choose the backward kernels, whichever forward ran.

    "triton" is the deterministic one.
    """
    if torch.are_deterministic_algorithms_enabled() or not is_hopper(q.device):
        return "triton"
    return "hopper" if hopper_backward_supported(q, k, v, layout, spec) else "triton"


def hopper_forward_supported(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> bool:
    """Return whether the Hopper forward takes these arguments, on any device."""
    dim, v_dim = q.shape[3], v.shape[3]
    return (
        q.dtype in _DTYPES
        and layout.block_size in _BLOCKS
        and (spec.causal or spec.cu_seqlens is None)
        and dim <= 2 * PANEL
        and v_dim % (_ALIGNMENT // v.element_size()) == 0  # the output's strides
        and padded_to_panels(v_dim) <= padded_to_panels(dim)  # the output reuses the queries' shared memory
        and q.numel() > 0
        and v.numel() > 0
        and max(spec.query_offset + q.shape[2], k.shape[2]) <= _LENGTH
        and not (isinstance(layout, TopKLayout) and layout.slots > MAX_SLOTS)
        and all(fits_descriptor(x) for x in (q, k, v))
    )


def hopper_backward_supported(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> bool:
    """Return whether the Hopper backward takes these arguments, on any device."""
    batch, num_heads, s_q, dim = q.shape
    tiles_per_block = layout.block_size // _BACKWARD_TILE
    query_end = spec.query_offset + s_q
    num_tiles = -(-query_end // _BACKWARD_TILE) - spec.query_offset // _BACKWARD_TILE
    num_pairs = -(-k.shape[2] // (2 * _BACKWARD_TILE))
    longest = max(query_end, k.shape[2])
    if spec.cu_seqlens is not None:
        documents = spec.cu_seqlens.numel() - 1
        num_tiles, num_pairs = num_tiles + documents, num_pairs + documents
        longest = layout.block_size * min(layout.num_query_blocks, layout.num_key_blocks)
    return (
        (q.dtype, dim) in _BACKWARD_KINDS
        and layout.block_size in _BLOCKS
        and (spec.cu_seqlens is None or spec.causal)
        and v.shape[3] == dim
        and q.numel() > 0
        and k.numel() > 0
        and num_heads // k.shape[1] <= MAX_GROUP
        and longest <= 2**QUERY_BITS * _BACKWARD_TILE
        and batch * num_heads * num_tiles * 2 * dim < _INDICES  # rows of the dq accumulator
        and batch * k.shape[1] * num_pairs < _INDICES  # programs
        and layout.kept_blocks_of_heads * tiles_per_block**2 < _INDICES  # steps
        and all(fits_descriptor(x) for x in (q, k, v))
    )


def padded_to_panels(dim: int) -> int:
    """Return the head dimension padded as in the kernel."""
    return -(-dim // PANEL) * PANEL


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Return whether device and Triton can run the Hopper kernels.

    The device needs Hopper's instructions, and Triton the Gluon version that the kernels use.
    """
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) == (9, 0)
        and triton.__version__.startswith(TRITON)
    )


def fits_descriptor(x: Tensor) -> bool:
    """Return whether TMA can access a view [b, h, s, d]."""
    size = x.element_size()
    *strides, last = x.stride()
    if last != 1 or x.data_ptr() % _ALIGNMENT != 0:
        return False
    for extent, stride in zip(x.shape[:3], strides, strict=True):
        if extent > 1 and not (0 < stride * size < _MAX_STRIDE and stride * size % _ALIGNMENT == 0):
            return False
    return True
