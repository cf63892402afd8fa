"""Builds the layout of a run's model."""

from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import PretrainConfig


def hybrid_layout(cfg: PretrainConfig) -> HybridLayout:
    """Build the layout of all heads and layers of a run's model.

    Raises:
        ConfigError: layout or schedule don't fit the model's layers and heads.
    """
    model = cfg.model
    return build_hybrid_layout(
        cfg.layout,
        cfg.schedule,
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
    )
