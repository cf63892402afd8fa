"""Makes TMA descriptors at less host cost than Triton."""

from __future__ import annotations

from dataclasses import MISSING, fields

from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Triton 3.6 has the field `padding`; 3.7 also has `round_f32_to_tf32`.
_DEFAULTS = {field.name: field.default for field in fields(TensorDescriptor) if field.default is not MISSING}


def descriptor(
    base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: NVMMASharedLayout
) -> TensorDescriptor:
    """Make a `TensorDescriptor` without its checks.

    The checks would take two thirds of the time; `fits_descriptor` has already made them.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(_DEFAULTS, base=base, shape=shape, strides=strides, block_shape=block_shape, layout=layout)
    return made
