"""Cross entropy that overwrites the logits with their gradient, by Liger-Kernel's kernel.

`LigerCrossEntropyFunction` rounds losses to the logits' dtype, waits for the device to check labels, and copies the
logits in the backward. Its kernel does none of these.
"""

from typing import Any

import torch
from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.kernels.scale_rows import scale_rows
from s2train.megatron.liger_losses import IGNORED

_WARPS = 32  # as Liger-Kernel launches it on GPUs before Blackwell


class _LossInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        rows, words = logits.shape
        losses = logits.new_zeros(rows, dtype=torch.float32)
        liger_cross_entropy_kernel[(rows,)](
            logits, logits.stride(0), labels, labels.stride(0), None, losses, None, 1, None, 0, None, 0,
            words, 1, 1, 0.0, IGNORED, 0.0, 0.0, "none", None,
            RETURN_Z_LOSS=False, RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(MAX_FUSED_SIZE, 1 << (words - 1).bit_length()),
            HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=ctx.needs_input_grad[0], num_warps=_WARPS,
        )  # fmt: skip
        ctx.save_for_backward(logits)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        gradient = gradient.detach()
        scale_rows(gradient, dlosses)
        return gradient, None


def loss_in_place(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute cross entropy [s, b], fp32, and overwrite the logits.

    They become their gradient, which the backward scales in place: it can run once. Without gradients they stay.

    Args:
        logits: [s, b, vocab], of a linear layer: its backward reads its input, not its output.
        labels: [s, b].
    """
    losses: Tensor = _LossInPlace.apply(logits.flatten(0, 1), labels.flatten())
    return losses.view(labels.shape)
