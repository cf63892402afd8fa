"""Megatron's layer specs for the hybrid layout of one pipeline stage."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import AttentionKind, LayerLayout
from s2train.megatron.core_attention import CausalCoreAttention
from s2train.megatron.layer import HybridTransformerLayer
from s2train.megatron.layer_backends import Backend
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.shared_kv_heads import KVSharingSelfAttention


@dataclass(frozen=True)
class CoreSettings:
    """Arguments of `CausalCoreAttention` that all layers of a model share."""

    num_query_groups: int  # the model's; that of Megatron's config is larger where ranks share KV heads
    cache: LayoutCache
    backend: str
    seed: int


def core_attention_class(kind: AttentionKind) -> type[CausalCoreAttention]:
    """Import the core attention that a kind names."""
    module, _, name = kind.core_attention.partition(":")
    found: type[CausalCoreAttention] = getattr(import_module(module), name)
    return found


def layer_spec(
    config: TransformerConfig,
    layer: LayerLayout,
    layer_number: int,
    backend: Backend,
    core: CoreSettings,
    cp_exchange: str,
) -> ModuleSpec:
    """Make the spec of one layer.

    `layer_number` counts from 1 over the model.
    """
    spec = backend.layer_spec(config.qk_layernorm)
    spec.module = HybridTransformerLayer
    own = {"hybrid_layer_number": layer_number, "mlp_class": backend.mlp}
    spec.params = {**(spec.params or {}), **own}
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(
        module=core_attention_class(layer.kind),
        params={"layer_layout": layer, "cp_exchange": cp_exchange, **vars(core)},
    )
    return spec


def layer_ids(config: TransformerConfig, vp_stage: int | None) -> list[int]:
    """Return 0-based layers of this pipeline rank and virtual stage."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage)))


def block_spec(
    config: TransformerConfig,
    hybrid: HybridLayout,
    backend: Backend,
    core: CoreSettings,
    cp_exchanges: Sequence[str],
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Make the specs of this stage's layers.

    `cp_exchanges` has one mode for each of the model's layers.
    """
    specs = [
        layer_spec(config, hybrid.layers[i], i + 1, backend, core, cp_exchanges[i]) for i in layer_ids(config, vp_stage)
    ]
    if config.tensor_model_parallel_size > hybrid.num_query_groups:
        for attention in (spec.submodules.self_attention for spec in specs):
            if attention.module is SelfAttention:
                attention.module = KVSharingSelfAttention
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=backend.norm)
