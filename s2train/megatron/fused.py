"""Megatron's MLP and loss, computed by Liger-Kernel's Triton kernels.

Parameters and their names stay Megatron's.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from s2train.environment.liger import PACKAGE, RELEASE
from s2train.kernels.versions import installed_version
from s2train.megatron.liger_losses import linear_loss, vocab_parallel_loss


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half by the second half.

    Halves are of the last dimension: [s, b, 2 f] to [s, b, f]. The backward overwrites `gate_up` with the gradient,
    which is safe: a linear layer's backward reads its input, not its output.
    """
    return _swiglu_of(installed_version(PACKAGE))(gate_up)


@cache
def _swiglu_of(release: str | None) -> Callable[[Tensor], Tensor]:
    if release != RELEASE:
        return swiglu_launched_by_liger
    from s2train.megatron.swiglu_in_place import swiglu_in_place  # needs one release of Liger-Kernel

    return swiglu_in_place


def swiglu_launched_by_liger(gate_up: Tensor) -> Tensor:
    """Compute `swiglu` in any release of Liger-Kernel, at more host cost."""
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
    """Output layer that can leave its product to the loss.

    While it `defers`, it returns its input, which the loss multiplies in pieces.
    """

    defers = False

    def forward(self, input_: Tensor, weight: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        return (input_, None) if self.defers else super().forward(input_, weight, *args, **kwargs)


class LigerLossModel(GPTModel):
    """A GPTModel with Liger-Kernel's loss.

    The loss takes logits, or with `fuse_output` (without tensor parallelism) hidden states. The output layer is called
    in both cases, because hooks of Megatron's data parallelism are attached to it.

    Args:
        in_place: the loss overwrites the logits (without tensor parallelism).
    """

    def __init__(self, *args: Any, fuse_output: bool, in_place: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert not in_place or self.config.tensor_model_parallel_size == 1
        self.in_place = in_place
        self.fuse_output = fuse_output and self.post_process
        if self.fuse_output:
            assert type(self.output_layer) is ColumnParallelLinear
            assert self.config.tensor_model_parallel_size == 1
            self.output_layer.__class__ = DeferringOutput  # Megatron's constructor has a fixed class

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        if not self.fuse_output:
            return super().forward(*args, labels=labels, **kwargs)
        self.output_layer.defers = labels is not None
        try:
            return super().forward(*args, labels=labels, **kwargs)
        finally:
            self.output_layer.defers = False

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute per-token losses [b, s] from the output layer's result.

        Labels are [b, s].
        """
        labels = labels.transpose(0, 1).contiguous()
        if self.fuse_output:
            shared = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
            loss = linear_loss(logits, weight, labels)
        elif self.in_place:
            from s2train.megatron.in_place_loss import loss_in_place  # needs one release of Liger-Kernel

            loss = loss_in_place(logits, labels)
        else:
            loss = vocab_parallel_loss(logits, labels, self.pg_collection.tp)
        return loss.transpose(0, 1).contiguous()
