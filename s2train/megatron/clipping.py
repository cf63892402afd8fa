"""Gradient norm and clipping by torch's foreach kernels.

Megatron takes these two functions from transformer-engine or apex. Without them, it computes one norm per tensor, waits
for the GPU once per tensor, and clips in two passes over the gradients. The functions here give the same results in a
few kernels and in one pass, without a wait.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm, local_multi_tensor_scale
from torch import Tensor

from s2train.megatron.compat import gradients_for_norm
from s2train.megatron.optimizer_state import optimizer_parts


def replace_stand_ins() -> None:
    """Replace Megatron's functions in this process.

    Those of transformer-engine or apex are kept.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
    if clip_grads.multi_tensor_scale_impl is local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _scale


@torch.no_grad()
def squared_norm(optimizer: MegatronOptimizer) -> Tensor:
    """Compute the square of the prepared gradients' norm, fp32 [1].

    Collective; the same on every rank. Megatron's own function waits for the GPU.
    """
    gradients = [gradient for part in optimizer_parts(optimizer) for gradient in gradients_for_norm(part)]
    if gradients:
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, _no_overflow(), [gradients], False)
        square: Tensor = (norm**2).reshape(1)
    else:
        square = torch.zeros(1, device=torch.cuda.current_device())
    torch.distributed.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
    return square


@torch.no_grad()
def clip(optimizer: MegatronOptimizer, norm: float, share: float = 1.0) -> None:
    """Divide the prepared gradients by `share`, and scale them down to `clip_grad`.

    `norm` is that of the quotient.
    """
    for part in optimizer_parts(optimizer):
        factor = part.config.clip_grad / (norm + 1e-6)  # as Megatron computes it
        factor = (factor if 0 < factor < 1 else 1.0) / share
        if factor == 1:
            continue
        name = "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients = [getattr(parameter, name, None) for parameter in part.get_parameters()]
        gradients = [gradient for gradient in gradients if gradient is not None]
        if gradients:
            both = [gradients, gradients]
            clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, _no_overflow(), both, factor)


def _no_overflow() -> Tensor:
    """Return the flag that kernels of transformer-engine and apex set."""
    return torch.zeros(1, dtype=torch.int, device=torch.cuda.current_device())


def _norm(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Compute the norm [1] of all tensors together."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).reshape(1), None


def _scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], factor: float) -> None:
    """Multiply all tensors in place."""
    tensors, destinations = tensor_lists  # Megatron passes one list twice
    assert all(one is other for one, other in zip(tensors, destinations, strict=True))
    torch._foreach_mul_(tensors, factor)
