"""Convolutions without TF32.

torch rounds convolutions of float32 to TF32 by default, but not matrix products: blocks would be selected by scores of
10 bits. A convolution has no argument for it, and its backward pass reads torch's flag once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def convolve(maps: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Convolve in the full precision of the dtype, forward and backward.

    Maps are [b, channels, rows, columns].
    """
    found: Tensor = _Convolution.apply(maps, weight, groups)
    return found


class _Convolution(torch.autograd.Function):
    """`F.conv2d`, with torch's flag off around each pass."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.groups = groups
        with _without_tf32():
            return F.conv2d(maps, weight, groups=groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        maps, weight = ctx.saved_tensors
        of_maps, of_weight = ctx.needs_input_grad[:2]
        with _without_tf32():
            return (
                conv2d_input(maps.shape, weight, grad, groups=ctx.groups) if of_maps else None,
                conv2d_weight(maps, weight.shape, grad, groups=ctx.groups) if of_weight else None,
                None,
            )


@contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
