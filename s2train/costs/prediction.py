"""Predict a layout's gains at each length before training.

Reports FLOPs, bytes, cache and speed-ups. Times are of forward and backward on one device, without parallelism,
communication or optimizer; their ratios hold as long as these take little time. Measured figures to compare with:
`kernels/benchmarks` (attention) and `launch/hybrid_vs_dense.sh` (whole steps).
"""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import ModelConfig, head_dim
from s2train.costs.attention import attention_flops, density
from s2train.costs.attention_time import BACKWARD_FLOPS, AttentionRates, Seconds, attention_seconds, dense_seconds
from s2train.costs.flops import token_flops
from s2train.costs.kv_cache import CacheTokens, cache_tokens, model_cache_tokens
from s2train.costs.traffic import Traffic, attention_traffic, sum_traffic
from s2train.layouts.patterns import known_blocks

# Hidden size -> FLOP/s of everything but attention on an H100 in bf16, measured by `s2train.costs.measure`
# (launch/results/2026-11-22-h100-linear.json): 0.2 to 0.8 of an 8192³ product's rate.
_LINEAR_RATES = ((768, 144e12), (1024, 295e12), (2048, 507e12), (4096, 591e12))

LENGTHS = tuple(1024 * n for n in (8, 16, 32, 64, 128, 256, 512, 1024))  # tokens


def linear_rate(hidden_size: int) -> float:
    """Return FLOP/s of norms, projections and MLP, interpolated linearly between measurements."""
    sizes, rates = zip(*_LINEAR_RATES, strict=True)
    place = bisect.bisect_left(sizes, hidden_size)
    if place == 0 or place == len(sizes):
        return rates[min(place, len(sizes) - 1)]
    share = (hidden_size - sizes[place - 1]) / (sizes[place] - sizes[place - 1])
    return rates[place - 1] + share * (rates[place] - rates[place - 1])


@dataclass(frozen=True)
class LayerCosts:
    """Costs of one sequence in one layer's attention.

    Attributes:
        density: kept over causal positions.
        forward_flops, backward_flops: of the matrix products; the backward repeats two of them.
        traffic: bytes.
        cache: tokens, over KV heads.
        seconds: predicted.
    """

    density: float
    forward_flops: float
    backward_flops: int
    traffic: Traffic
    cache: CacheTokens
    seconds: Seconds


@dataclass(frozen=True)
class ModelCosts:
    """Costs of one sequence of `seq_length` tokens in the whole model.

    Attributes:
        cache: tokens over layers and KV heads; in bytes `cache.nbytes(tokens, head_dim)`.
        linear_seconds: predicted time of everything but attention, forward and backward.
        dense_seconds: predicted time of attention if every layer were dense.
    """

    seq_length: int
    head_dim: int
    layers: tuple[LayerCosts, ...]
    cache: CacheTokens
    linear_seconds: float
    dense_seconds: float

    @property
    def density(self) -> float:
        return sum(layer.density for layer in self.layers) / len(self.layers)

    @property
    def forward_flops(self) -> float:
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def backward_flops(self) -> int:
        return sum(layer.backward_flops for layer in self.layers)

    @property
    def traffic(self) -> Traffic:
        return sum_traffic([layer.traffic for layer in self.layers])

    @property
    def attention_seconds(self) -> float:
        return sum(layer.seconds.both for layer in self.layers)

    @property
    def attention_speedup(self) -> float:
        """Return the speed-up of attention over dense.

        It is of forward and backward in all layers.
        """
        return self.dense_seconds / self.attention_seconds

    @property
    def step_speedup(self) -> float:
        """Return the speed-up of the whole forward and backward over dense."""
        return (self.linear_seconds + self.dense_seconds) / (self.linear_seconds + self.attention_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the model's sums as plain values.

        The values are bytes (for a cache in bf16), FLOPs, seconds and ratios.
        """
        nbytes = {name: self.cache.nbytes(getattr(self.cache, name), self.head_dim) for name in asdict(self.cache)}
        return {
            "seq_length": self.seq_length,
            "density": self.density,
            "attention_flops": {"forward": self.forward_flops, "backward": self.backward_flops},
            "attention_bytes": asdict(self.traffic),
            "kv_cache_bytes": nbytes,
            "predicted_seconds": {
                "attention": self.attention_seconds,
                "dense_attention": self.dense_seconds,
                "all_else": self.linear_seconds,
            },
            "predicted_speedup": {"attention": self.attention_speedup, "step": self.step_speedup},
        }


def model_costs(model: ModelConfig, hybrid: HybridLayout, seq_length: int) -> ModelCosts:
    """Count a sequence's exact costs, and predict its times on an H100."""
    rates, dim = AttentionRates(), head_dim(model)
    of_layer = {
        layer: _layer_costs(layer, hybrid.num_query_groups, seq_length, dim, rates) for layer in set(hybrid.layers)
    }
    dense = dense_seconds(model.num_attention_heads, seq_length, dim, rates)
    linear_flops = token_flops(model, hybrid, seq_length).matmul * seq_length
    return ModelCosts(
        seq_length=seq_length,
        head_dim=dim,
        layers=tuple(of_layer[layer] for layer in hybrid.layers),
        cache=model_cache_tokens(hybrid, seq_length),
        linear_seconds=linear_flops / linear_rate(model.hidden_size),
        dense_seconds=model.num_layers * dense.both,
    )


def _layer_costs(
    layer: LayerLayout, num_query_groups: int, seq_length: int, dim: int, rates: AttentionRates
) -> LayerCosts:
    forward = attention_flops(layer, seq_length, dim)
    return LayerCosts(
        density=density(layer, seq_length),
        forward_flops=forward,
        backward_flops=int(BACKWARD_FLOPS * forward),
        traffic=attention_traffic(layer, num_query_groups, seq_length, dim),
        cache=cache_tokens(layer, num_query_groups, seq_length),
        seconds=attention_seconds(layer, seq_length, dim, rates),
    )


def known_lengths(hybrid: HybridLayout, lengths: Sequence[int] = LENGTHS) -> tuple[int, ...]:
    """Return those of `lengths` that all heads' masks from files cover."""
    longest = known_blocks(hybrid.bounds, max(lengths)) * hybrid.block_size
    return tuple(length for length in lengths if length <= longest)
