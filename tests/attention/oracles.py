"""For each kind of attention a case that the conformance suite runs, and its definition in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from s2train.kernels.hyper.hashing import hash_ranks
from s2train.kernels.hyper.reference import key_weights
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.megatron.core_attention import CausalCoreAttention
from tests.attention import block_selection_oracle as block_selection

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Oracle:
    """A kind's settings, and what it should compute, written by definition.

    Attributes:
        layers, kinds: of the layout; one kind alone.
        kind: its name.
        read: which keys each query reads: (core, query, key) -> bool [b, h, s, s]. None: those that `weigh` weighs.
        weigh: factor of each key's probability before all are divided by their sum: (core, query, key) -> [b, h, s, s];
            None: 1 for keys that are read.
        losses: auxiliary losses as `add_loss` takes them, by name: (core, weights by name, query, key, value).
        counted_products: FLOPs of Q Kᵀ and P V, as the CPU path computes them, of one sequence; None: of no interest,
            since the kind adds none of its own.
        decodes_as: layers whose model decoding equals, with the same weights; None: `layers`.
        finish: what becomes of the output [s, b, h, d]: (weights by name, query, value, output).
    """

    kind: str
    layers: str
    read: Callable[[CausalCoreAttention, Tensor, Tensor], Tensor] | None
    kinds: dict[str, Any] = field(default_factory=dict)
    losses: Callable[[CausalCoreAttention, dict[str, Tensor], Tensor, Tensor, Tensor], Losses] = lambda *_: {}
    counted_products: Callable[[CausalCoreAttention, int], int] | None = None
    weigh: Callable[[CausalCoreAttention, Tensor, Tensor], Tensor] | None = None
    decodes_as: str | None = None
    finish: Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor] = lambda _weights, _query, _value, out: out

    def weights(self, core: CausalCoreAttention, query: Tensor, key: Tensor) -> Tensor:
        """Factor of each key's probability, 0 for keys that are not read: [b, h, s, s]."""
        if self.weigh is not None:
            return self.weigh(core, query, key)
        assert self.read is not None
        return self.read(core, query, key).to(query.dtype)

    def attend(
        self, core: CausalCoreAttention, own: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Softmax over the keys that are read, in the inputs' dtype: [s, b, h, d]; `own` weights by name."""
        group = query.shape[2] // key.shape[2]
        weights = self.weights(core, query, key).to(query.dtype)
        keys, values = (x.repeat_interleave(group, dim=2) for x in (key, value))
        scores = torch.einsum("qbhd,kbhd->bhqk", query, keys) * core.softmax_scale
        out = torch.einsum("bhqk,kbhd->qbhd", (scores + weights.log()).softmax(-1), values)
        return self.finish(own, query, value, out)


def _static(core: CausalCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    return token_masks(core.layer_layout, key.shape[0])[slice(*core.heads)].expand(key.shape[1], -1, -1, -1)


def token_masks(layer: LayerLayout, length: int) -> Tensor:
    """What each head's pattern keeps, token by token: bool [h, s, s]."""
    position = torch.arange(length)
    block, causal = position // layer.block_size, position[:, None] >= position
    return torch.stack([head.keep(block[:, None], block[None, :]) & causal for head in layer.bound])


def _toy_directions(core: CausalCoreAttention) -> Tensor:
    """Of this rank's heads, float64."""
    parts = []
    for head in range(core.heads[1] - core.heads[0]):
        generator = core.random_generator(head, torch.device("cpu"))
        drawn = torch.empty(core.shape.head_dim).normal_(generator=generator)
        parts.append(core.direction[head].double() * core.scale.double() + drawn.double())
    return torch.stack(parts).detach()


def _toy_read(core: CausalCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    directions = _toy_directions(core)
    group = len(directions) // key.shape[2]
    position = torch.arange(key.shape[0])
    distance = position[:, None] - position
    read = []
    for head, direction in enumerate(directions):
        chosen = (key[:, :, head // group].detach().double() @ direction).T > 0  # [b, s]
        window = core.layer_layout.kind.settings.window
        read.append(((distance < window) | chosen[:, None, :]) & (distance >= 0))
    return torch.stack(read, dim=1)


def _toy_losses(
    core: CausalCoreAttention, weights: dict[str, Tensor], query: Tensor, key: Tensor, value: Tensor
) -> Losses:
    group = len(weights["direction"]) // key.shape[2]
    total = torch.zeros((), dtype=key.dtype)
    for head, direction in enumerate(weights["direction"]):
        predicted = (key[:, :, head // group].detach() @ (direction * weights["scale"])).sigmoid()
        aim = value[:, :, head // group].detach().mean(-1).sigmoid()
        total = total + (predicted - aim).square().mean()
    return {"agreement": total / core.shape.num_heads}


def _hyper_weights(core: CausalCoreAttention, query: Tensor, key: Tensor) -> Tensor:
    """Of buckets that float32 finds, as the core does: another rounding could move a key to the next one."""
    settings = core.layer_layout.kind.op_settings
    group = core.shape.num_heads // core.shape.num_query_groups
    heads = range(0, core.heads[1] - core.heads[0], group)
    directions, samples = (
        torch.tensor([core.random_seed(head, name) for head in heads]) for name in ("projections", "samples")
    )
    q, k = (x.detach().float().permute(1, 2, 0, 3) for x in (query, key))
    return key_weights(*hash_ranks(q, k, directions, settings.projections), settings, samples, causal=True)


def _whole_products(core: CausalCoreAttention, length: int) -> int:
    return 4 * core.shape.num_heads * core.shape.head_dim * length**2


ORACLES = {
    "dense": Oracle("dense", "D", _static),
    "s2": Oracle("s2", "S", _static),
    "toy": Oracle("toy", "T", _toy_read, {"T": {"kind": "toy", "window": 5}}, _toy_losses, _whole_products),
    **{
        f"block selection by {name}": Oracle(
            "block_selection",
            "B",
            block_selection.read,
            {"B": {"kind": "block_selection", "scorer": name, "top_k": 1, "sinks": 0, "sampled_rows": 20} | settings},
            block_selection.losses,
            lambda *_: 0,  # torch's fused attention is not counted
            finish=block_selection.finish,
        )
        for name, settings in (
            ("moba", {}),
            ("index", {"queries": "first_token", "index_dim": 8}),
            ("sea", {"features": 8, "channels": 4, "mix_mean": True}),
        )
    },
    "hyper": Oracle(
        "hyper",
        "H",
        None,
        {"H": {"kind": "hyper", "bucket": 16, "samples": 4, "projections": 8, "shortest": 16, "window": 0, "sinks": 0}},
        counted_products=_whole_products,
        weigh=_hyper_weights,
        decodes_as="D",
    ),
}
