"""Replaces the attention of a built model's layers, and reads its inputs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.megatron.core_attention import CausalCoreAttention


@dataclass(frozen=True)
class AttentionInputs:
    """What one layer's core attention gets.

    Attributes:
        query: [s, b, h, d], rotated.
        key, value: [s, b, h_kv, d].
        scale: factor of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float


def core_of(gpt: GPTModel, layer: int) -> CausalCoreAttention:
    """Return the core attention of a layer, counted from 0."""
    core = gpt.decoder.layers[layer].self_attention.core_attention
    assert isinstance(core, CausalCoreAttention)
    return core


@contextmanager
def replaced_attention(gpt: GPTModel, layouts: Mapping[int, LayerLayout]) -> Iterator[list[CausalCoreAttention]]:
    """Give layers another attention inside this context; yields their new core attentions.

    The projections and all other weights stay.

    Args:
        gpt: a whole model, without pipeline parallelism.
        layouts: by layer, counted from 0.
    Raises:
        ValueError: a kind has weights, which an untrained layer can't have.
    """
    before = {number: core_of(gpt, number) for number in layouts}
    try:
        for number, layout in layouts.items():
            gpt.decoder.layers[number].self_attention.core_attention = _core(before[number], layout)
        yield [core_of(gpt, number) for number in layouts]
    finally:
        for number, core in before.items():
            gpt.decoder.layers[number].self_attention.core_attention = core


def _core(old: CausalCoreAttention, layout: LayerLayout) -> CausalCoreAttention:
    if layout.kind.weights(old.shape):
        raise ValueError(f"{layout.kind.label} attention adds weights: train it, or choose another kind")
    module, _, name = layout.kind.core_attention.partition(":")
    core = getattr(import_module(module), name)(
        old.config,
        old.layer_number,
        AttnMaskType.causal,
        "self",
        softmax_scale=old.softmax_scale,
        layer_layout=layout,
        num_query_groups=old.shape.num_query_groups,
        cache=old.cache,
        backend=old.backend,
        seed=old.seed,
        cp_exchange=old.cp_exchange,
    )
    assert isinstance(core, CausalCoreAttention)
    core.step = old.step
    return core.train(old.training)


@contextmanager
def attention_inputs(gpt: GPTModel, layers: range) -> Iterator[dict[int, AttentionInputs]]:
    """Collect the inputs of these layers' attention, by layer from 0.

    They are those of the last forward pass.
    """
    found: dict[int, AttentionInputs] = {}
    handles = []
    for number in layers:
        core = core_of(gpt, number)

        def collect(own: CausalCoreAttention, given: tuple[Tensor, ...], number: int = number) -> None:
            query, key, value = (tensor.detach() for tensor in given[:3])
            found[number] = AttentionInputs(query, key, value, own.softmax_scale)

        handles.append(core.register_forward_pre_hook(collect))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
