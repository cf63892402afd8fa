"""The transformer layer of a hybrid model."""

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from s2train.layouts.hybrid import LayerLayout


class HybridTransformerLayer(TransformerLayer):
    """Megatron's layer that knows its layout, and refuses to stand in another layer's place.

    Args:
        layer_layout: attention of this layer.
        hybrid_layer_number: 1-based position in the whole model that the layout was made for.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        layer_layout: LayerLayout,
        hybrid_layer_number: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        assert self.layer_number == hybrid_layer_number, "pipeline slicing gave the layer another's layout"
        self.layer_layout = layer_layout
