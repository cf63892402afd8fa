"""Auxiliary losses inside layers: attach gradients and record values to log.

Follows Megatron's DSAIndexerLossAutoScaler.
"""

from typing import Any

import torch
from torch import Tensor


def attach_loss(out: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
    """Return `out`; its backward pass also runs that of `loss`, times `scale`.

    Args:
        loss, scale: [].
    """
    if not torch.is_grad_enabled() or not loss.requires_grad:
        return out
    attached: Tensor = _Attached.apply(out, loss, scale)
    return attached


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, scale: float | Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss).mul_(ctx.scale), None


class Records:
    """Sums and counts of named scalars, kept on the device without synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add one value."""
        value = value.detach().float()
        total, count = self._sums.get(name, (torch.zeros_like(value), 0))
        self._sums[name] = (total + value, count + 1)

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Return sums and counts by name, and reset them."""
        sums, self._sums = self._sums, {}
        return sums
