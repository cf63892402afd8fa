"""FLOPs of a training step for utilisation: forward and backward without recomputation.

A multiply-add is two FLOPs; the backward pass costs twice the forward.
"""

from dataclasses import dataclass

from s2train.attention.hybrid import HybridLayout
from s2train.attention.teacher import teacher_layout, teacher_setting
from s2train.config import ModelConfig
from s2train.costs.attention import attention_flops
from s2train.costs.parameters import attention_shape, layer_parameters


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs per trained token, averaged over the sequence.

    Attributes:
        matmul: linear layers and LM head.
        attention: QK and PV over the positions that the layers keep (exact or expected), and what their kinds add.
        dense_attention: the same if every layer were dense and causal.
    """

    matmul: float
    attention: float
    dense_attention: float

    @property
    def sparse(self) -> float:
        return self.matmul + self.attention

    @property
    def dense(self) -> float:
        return self.matmul + self.dense_attention


def token_flops(model: ModelConfig, hybrid: HybridLayout, seq_length: int) -> TokenFlops:
    """Count training FLOPs per token, averaged over a sequence of `seq_length`."""
    shape = attention_shape(model)
    dim = shape.head_dim
    matmul = {layer: layer_parameters(model, layer).matmul for layer in set(hybrid.layers)}
    weights = sum(matmul[layer] for layer in hybrid.layers) + model.vocab_size * model.hidden_size
    forward = {
        layer: attention_flops(layer, seq_length, dim) + layer.kind.extra_flops(layer, seq_length, shape)
        for layer in set(hybrid.layers)
    }
    causal = seq_length * (seq_length + 1) // 2
    dense = model.num_layers * model.num_attention_heads * 4 * dim * causal
    return TokenFlops(
        matmul=6.0 * weights,
        attention=3 * sum(forward[layer] for layer in hybrid.layers) / seq_length,
        dense_attention=3 * dense / seq_length,
    )


def teacher_flops(model: ModelConfig, hybrid: HybridLayout, seq_length: int) -> float:
    """Count the FLOPs per token of the teacher's forward pass.

    It has no LM head. The count is 0 without a teacher.
    """
    if teacher_setting(hybrid.layers) is None:
        return 0.0
    training = token_flops(model, teacher_layout(hybrid), seq_length)
    return training.dense / 3 - 2.0 * model.vocab_size * model.hidden_size
