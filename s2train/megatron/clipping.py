"""Gradient norm and clipping by torch's foreach kernels.

Megatron takes these two functions from transformer-engine or apex. Without them, it computes one norm per tensor, waits
for the GPU once per tensor, and clips in two passes over the gradients. The functions here give the same results in a
few kernels, with one wait and one pass.
"""

from typing import Any

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor


def replace_stand_ins() -> None:
    """Replace Megatron's functions in this process.

    Those of transformer-engine or apex are kept.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


def _norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Compute the norm [1] of all tensors together."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def _scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Multiply all tensors in place."""
    tensors, destinations = tensor_lists  # Megatron passes one list twice
    assert all(one is other for one, other in zip(tensors, destinations, strict=True))
    torch._foreach_mul_(tensors, factor)
