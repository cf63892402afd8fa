"""Transformer layer of a hybrid model."""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from s2train.megatron.recomputed_norm import recompute_output


class HybridTransformerLayer(TransformerLayer):
    """Megatron's layer, checked against the position that its layout was made for.

    Where Megatron recomputes the MLP, this layer also recomputes both norms. Norms of transformer-engine are parts of
    linear layers: the MLP's is recomputed with it, the other's output is saved.

    Args:
        hybrid_layer_number: 1-based position in the whole model that the layout was made for.
        mlp_class: class whose forward pass the MLP uses; None: Megatron's.
    """

    recompute_mlp: bool  # Megatron's

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        hybrid_layer_number: int,
        mlp_class: type[MLP] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        assert self.layer_number == hybrid_layer_number, "pipeline slicing gave the layer another's layout"
        if mlp_class is not None:
            assert type(self.mlp) is MLP
            self.mlp.__class__ = mlp_class  # Megatron releases test for MLP in different ways, so no spec can name it
        # Megatron would save the output of the MLP's norm.
        self.recomputes_norms = self.recompute_mlp and not isinstance(self.pre_mlp_layernorm, IdentityOp)
        if self.recomputes_norms:
            self.recompute_mlp = False
            recompute_output(self.input_layernorm, self.self_attention.linear_qkv)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the norm, the MLP and the residual sum."""
        forward = super()._forward_mlp
        if not (self.recomputes_norms and self.training):
            return forward(hidden_states, *args, **kwargs)
        return tensor_parallel.checkpoint(lambda hidden: forward(hidden, *args, **kwargs), False, hidden_states)
