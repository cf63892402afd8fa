"""Megatron's MLP and loss with Liger-Kernel's Triton kernels in them: parameters and names stay Megatron's."""

from typing import Any

import torch
from liger_kernel.ops import (
    LigerFusedGateUpSiLUMulFunction,
    LigerFusedLinearCrossEntropyFunction,
)
from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

_IGNORED = -100  # a label that no token has: positions without loss are masked afterwards


def swiglu(gate_up: Tensor) -> Tensor:
    """SiLU of the first half of the last dimension times the second, [s, b, 2 f] to [s, b, f].

    The backward writes the gradient where `gate_up` lies, which nothing else reads: a linear layer's backward takes
    its input, not its output.
    """
    width = gate_up.shape[-1]
    out: Tensor = LigerFusedGateUpSiLUMulFunction.apply(gate_up.view(-1, width), True)
    return out.view(*gate_up.shape[:-1], width // 2)


class LigerMLP(MLP):
    """Megatron's gated MLP without biases."""

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> Any:
        assert per_token_scale is None, "scales belong to experts, which s2train's models have none of"
        gate_up, bias = self.linear_fc1(hidden_states)
        assert bias is None, "Liger's SwiGLU adds no bias"
        return self.linear_fc2(swiglu(gate_up))


class DeferringOutput(ColumnParallelLinear):
    """The output layer; while it `defers` it hands on its input, for the loss to multiply piece by piece."""

    defers = False

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return (input_, None) if self.defers else super().forward(input_, weight, *args, **kwargs)


def vocab_parallel_loss(logits: Tensor, labels: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Cross entropy [s, b], fp32, of logits [s, b, vocab / tp] and labels [s, b]."""
    smoothing = (0.0, "megatron", "partition")
    loss: Tensor = LigerVocabParallelCEFunction.apply(logits, labels, group, _IGNORED, *smoothing)
    return loss


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [s, b], fp32, of hidden [s, b, h] times weight [vocab, h]; no more than a piece of the logits.

    The backward computes the logits again. Weight gradients are summed in fp32 over the pieces.
    """
    options = (None, None, _IGNORED, 0.0, 0.0, "none", None, False, torch.float32)
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(hidden.flatten(0, 1), weight, labels.flatten(), *options)
    return loss.view(labels.shape)


class LigerLossModel(GPTModel):
    """A GPTModel whose loss is Liger's, over logits or (`fuse_output`, without tensor parallelism) over hidden states.

    The output layer is called either way, since the hooks of Megatron's data parallelism are on it.
    """

    def __init__(self, *args: Any, fuse_output: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fuse_output = fuse_output and self.post_process
        if self.fuse_output:
            assert type(self.output_layer) is ColumnParallelLinear
            assert self.config.tensor_model_parallel_size == 1
            self.output_layer.__class__ = DeferringOutput  # Megatron's constructor names the class that it makes

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not self.fuse_output:
            return super().forward(*args, labels=labels, **kwargs)
        self.output_layer.defers = labels is not None
        try:
            return super().forward(*args, labels=labels, **kwargs)
        finally:
            self.output_layer.defers = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Per-token losses [b, s] of labels [b, s], and of what the output layer gave."""
        labels = labels.transpose(0, 1).contiguous()
        if self.fuse_output:
            shared = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
            loss = linear_loss(logits, weight, labels)
        else:
            loss = vocab_parallel_loss(logits, labels, self.pg_collection.tp)
        return loss.transpose(0, 1).contiguous()
