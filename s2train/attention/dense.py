"""Dense attention: every head reads every causal key."""

from dataclasses import dataclass

from s2train.attention.features import ALL_FEATURES
from s2train.attention.kind import HeadsOf, StaticKind
from s2train.layouts.patterns import Dense


@dataclass(frozen=True)
class DenseSettings:
    """It has none."""


class DenseKind(StaticKind):
    """Letter D."""

    name = "dense"
    settings_type = DenseSettings
    core_attention = "s2train.megatron.block_attention:DenseCoreAttention"
    features = ALL_FEATURES

    def heads(self) -> HeadsOf:
        return lambda context: (Dense(),) * context.layer.num_heads
