"""Tensors that autograd saved for a backward.

Hooks (`torch.autograd.graph.saved_tensors_hooks`) may save something else, such as a copy in host memory, and return
another tensor than was saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Properties = tuple[Any, ...]  # of one tensor; strides last
NAMES = ("q", "k", "v", "the output", "the log-sum-exp")  # what every backward needs


def properties(*tensors: Tensor) -> tuple[Properties, ...]:
    """Return what launches on these tensors depend on, but for addresses."""
    return tuple([(x.shape, x.dtype, x.device, x.layout, x.stride()) for x in tensors])


def as_saved(tensors: Sequence[Tensor], names: Sequence[str], saved: Sequence[Properties]) -> list[Tensor]:
    """Check what hooks returned, and make it contiguous if its strides changed.

    Args:
        saved: `properties` of the tensors that were saved.

    Raises:
        ValueError: a tensor has another shape, dtype, device or layout.
    """
    found = []
    for x, name, then, now in zip(tensors, names, saved, properties(*tensors), strict=True):
        if now[:-1] != then[:-1]:
            was, returned = (
                f"{list(shape)}, {dtype}, {device}, {layout}" for shape, dtype, device, layout, _ in (then, now)
            )
            raise ValueError(
                f"{name} was saved for the backward as {was}, but a hook on saved tensors "
                f"(torch.autograd.graph.saved_tensors_hooks) returned {returned}: make it return "
                "a tensor like the one that it got"
            )
        found.append(x if now == then else x.contiguous())
    return found
