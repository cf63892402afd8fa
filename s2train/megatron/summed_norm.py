"""Residual sums and the norms after them, by Liger-Kernel's fused kernels.

A layer has two such pairs: attention's output is added to the residual stream and normed for the MLP, whose output is
added and normed for the next layer's attention. One kernel reads both summands, and writes the sum and its norm. In the
backward, one kernel adds the residual stream's gradient to the norm's.
"""

from collections.abc import Callable
from typing import Any

import torch
from liger_kernel.ops.fused_add_rms_norm import (
    _CASTING_MODE_GEMMA,
    _fused_add_rms_norm_backward_kernel,
    _fused_add_rms_norm_forward_kernel,
)
from liger_kernel.ops.utils import calculate_settings, torch_to_triton_dtype
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.kernels.configs import multiprocessors
from s2train.kernels.launch import Launcher
from s2train.megatron.norm import RMSNorm

# Liger-Kernel launches one program per multiprocessor, which waits for memory row by row: its RMSNorm's backward moves
# 1.2 TB/s on an H100 (launch/results/2026-11-28-h100-elementwise.json).
PROGRAMS = 8

# It casts to fp32 before the norm and back after the product with the weight, as torch's RMSNorm does.
_CASTING: int = _CASTING_MODE_GEMMA.value
_STAGES = 2  # as Liger-Kernel launches its kernels

_launch_forward = Launcher(_fused_add_rms_norm_forward_kernel)
_launch_backward = Launcher(_fused_add_rms_norm_backward_kernel)


class _SumAndNorm(torch.autograd.Function):
    """Liger-Kernel's kernels, launched at less host cost.

    The backward has more programs than Liger-Kernel's, and reads no zeros if nothing but the norm uses the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x, residual = x.contiguous(), residual.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        normed, total, rstd = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        block, warps = calculate_settings(width)
        _launch_forward(
            (rows, 1, 1),
            (
                normed, width, total, width, x, width, residual, width, weight, 1, rstd, 1,
                width, eps, 0.0, _CASTING, block,
            ),
            num_warps=warps, num_stages=_STAGES,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, rstd)
        return normed, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            return dtotal, dtotal, None, None
        total, weight, rstd = ctx.saved_tensors
        width = total.shape[-1]
        block, warps = calculate_settings(width)
        rows = total.numel() // width
        programs = PROGRAMS * (multiprocessors(total.device) if total.is_cuda else 1)
        dx = torch.empty_like(total)
        dweights = weight.new_empty(programs, width, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        each = -(-rows // programs)
        _launch_backward(
            (programs, 1, 1),
            (
                dnormed.contiguous(), width, None if dtotal is None else dtotal.contiguous(), width, dx, width,
                total, width, torch_to_triton_dtype[total.dtype], weight, 1, rstd, 1, dweights, width,
                rows, width, 0.0, each, _CASTING, block, dtotal is not None, dweights is not None,
            ),
            num_warps=warps, num_stages=_STAGES,
        )  # fmt: skip
        return dx, dx, None if dweights is None else dweights.sum(0).to(weight.dtype), None


def sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute the norm of a sum, and the sum.

    All are [s, b, h], the weight [h]. The sum is rounded to its dtype; the norm and gradients are computed in fp32 and
    rounded once.
    """
    normed, total = _SumAndNorm.apply(x, residual, weight, eps)
    return normed, total


class SummingRMSNorm(RMSNorm):
    """RMSNorm that computes the sum before it, if given two summands.

    It keeps the normed sum for its next call, which is for that sum. A layer thus returns the same hidden states as
    without it, for pipeline stages, recomputation and hooks. Both calls are calls of this module, since Megatron's data
    parallelism waits for a module's weights in a hook before its call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ready: tuple[Tensor, Tensor] | None = None  # a sum and its norm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the norm of `x`, or with a residual their sum.

        All are [s, b, h].
        """
        if residual is not None:
            assert self.eps is not None
            normed, total = sum_and_norm(x, residual, self.weight, self.eps)
            self._ready = total, normed
            return total
        ready, self._ready = self._ready, None
        if ready is None or not self.training:  # a training pass that failed leaves a sum behind
            return super().forward(x)
        total, normed = ready
        assert total is x, "the sum that was normed is not what this norm gets"
        return normed


class SumBefore:
    """Megatron's residual sum (`bias_dropout_add`), computed by the norm after it.

    In training only: evaluation and decoding add in place.
    """

    def __init__(self, norm: SummingRMSNorm) -> None:
        self.norm = norm

    def __call__(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        if not training:
            found: Callable[..., Tensor] = get_bias_dropout_add(training, fused)
            return found
        return self.add

    def add(self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        """Return the sum [s, b, h]."""
        x, bias = x_with_bias
        assert bias is None
        assert dropout == 0
        total: Tensor = self.norm(x, residual)
        return total


def fuse_sums(block: TransformerBlock) -> None:
    """Make a block's norms compute the sums before them.

    Two sums have no norm after them and stay Megatron's: the one that ends a pipeline stage, and between layers that
    are recomputed in full the one that ends what is recomputed together.
    """
    for layer in block.layers:
        assert not layer.recomputes_norms, "the norm would be computed outside of what is recomputed"
        layer.self_attn_bda = SumBefore(layer.pre_mlp_layernorm)
    if block.config.recompute_granularity == "full":
        return
    after = [*(layer.input_layernorm for layer in block.layers[1:]), block.final_layernorm]
    for layer, norm in zip(block.layers, after, strict=False):  # a stage may have no layers
        if norm is not None:
            layer.mlp_bda = SumBefore(norm)
