"""Cross entropy by Liger-Kernel's functions."""

import torch
from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction
from torch import Tensor

IGNORED = -100  # not a label of any token: positions without loss are masked afterwards


def vocab_parallel_loss(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Compute cross entropy [s, b], fp32, from vocabulary-parallel logits.

    Logits are [s, b, vocab / tp], labels [s, b].
    """
    smoothing = (0.0, "megatron", "partition")
    loss: Tensor = LigerVocabParallelCEFunction.apply(logits, labels, group, IGNORED, *smoothing)
    return loss


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Compute cross entropy [s, b], fp32, without storing all logits.

    Hidden states are [s, b, h], the weight [vocab, h]. Logits exist in pieces only; the backward recomputes them.
    Weight gradients accumulate in fp32 over the pieces.
    """
    options = (None, None, IGNORED, 0.0, 0.0, "none", None, False, torch.float32)
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, labels.flatten(), *options)
    return loss.view(labels.shape)
