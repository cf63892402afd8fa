"""A data-dependent kind of attention for tests: with weights, an auxiliary loss and random numbers.

Each head draws a direction from random numbers, and adds weights that it learns to it. A query reads the last `window`
keys, and of the earlier ones those that point along the direction. The weights learn from the auxiliary loss alone:
keys should predict the mean of their values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from s2train.attention.features import Feature
from s2train.attention.kind import DataDependentKind, LayerLayout, PairBytes
from s2train.attention.weights import AttentionShape, Weight


@dataclass(frozen=True)
class ToySettings:
    """Settings of the kind."""

    window: int = 8  # tokens
    loss_weight: float = 0.5


class ToyKind(DataDependentKind):
    """Written as an engineer who adds a kind would; see CONTRIBUTING.md."""

    name = "toy"
    settings_type = ToySettings
    core_attention = "tests.attention.toy_core:ToyCoreAttention"
    counts_exactly = False
    features = frozenset(
        {
            Feature.TENSOR_PARALLEL,
            Feature.SEQUENCE_PARALLEL,
            Feature.PIPELINE_PARALLEL,
            Feature.RECOMPUTATION,
            Feature.DETERMINISTIC,
            Feature.DECODING,
        }
    )
    may_change = frozenset({"loss_weight"})

    settings: ToySettings

    def check_settings(self) -> None:
        if self.settings.window < 1:
            raise self.error("window", "a query reads itself", "Set 1 or more (tokens).")

    def weights(self, shape: AttentionShape) -> tuple[Weight, ...]:
        return (
            Weight("direction", (shape.num_heads, shape.head_dim), split=0, std=0.02, may_be_missing=True),
            Weight("scale", (shape.head_dim,), fill=1.0, may_be_missing=True),
        )

    def kept_positions(self, layer: LayerLayout, seq_length: int) -> tuple[float, ...]:
        near = min(self.settings.window, seq_length)
        kept = near * (near + 1) // 2 + (seq_length - near) * near  # within the window
        causal = seq_length * (seq_length + 1) // 2
        return (kept + (causal - kept) / 2,) * len(layer.bound)  # a random direction takes half of the others

    def extra_flops(self, layer: LayerLayout, seq_length: int, shape: AttentionShape) -> float:
        return 2 * 2 * shape.head_dim * shape.num_heads * seq_length  # keys by direction: to choose, and for the loss

    def cpu_bytes(self, layer: LayerLayout, element_size: int) -> PairBytes:
        return PairBytes()

    def activation_bytes(self, layer: LayerLayout, seq_length: int, shape: AttentionShape, element_size: int) -> int:
        return 4 * 4 * shape.num_heads * seq_length**2  # scores and probabilities in fp32

    def columns(self) -> Mapping[str, float | None]:
        return {"agreement": self.settings.loss_weight, "kept_share": None}


class ShyKind(ToyKind):
    """The same, without any feature."""

    name = "shy"
    features = frozenset()
