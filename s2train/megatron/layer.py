"""Transformer layer of a hybrid model."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from s2train.attention.kind import LayerLayout


class HybridTransformerLayer(TransformerLayer):
    """Megatron's layer with a layout, checked against its position in the model.

    Args:
        layer_layout: attention of this layer.
        hybrid_layer_number: 1-based position in the whole model that the layout was made for.
        mlp_class: class whose forward pass the MLP uses; None: Megatron's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        layer_layout: LayerLayout,
        hybrid_layer_number: int,
        mlp_class: type[MLP] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        assert self.layer_number == hybrid_layer_number, "pipeline slicing gave the layer another's layout"
        self.layer_layout = layer_layout
        if mlp_class is not None:
            assert type(self.mlp) is MLP
            self.mlp.__class__ = mlp_class  # Megatron releases test for MLP in different ways, so no spec can name it
