"""Mixes attention's output with the mean of all values so far.

A learned gate weighs them, as in SEA (arXiv 2310.01777). SEA computes a gate for each token and head from its estimate
of attention. Here it comes from the token's query, because the estimate is of whole query blocks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from s2train.attention.selection.scorer import WeightOf, precise
from s2train.attention.weights import AttentionShape, Weight

_OPEN = 3.0  # initial bias: 95 % of the output is attention's, so that a dense model's weights still fit


def mixing_weights(shape: AttentionShape) -> tuple[Weight, ...]:
    """Weights of the gate."""
    return (
        Weight("gate_query", (shape.num_heads, shape.head_dim), split=0, may_be_missing=True),
        Weight("gate_bias", (shape.num_heads,), split=0, fill=_OPEN, may_be_missing=True),
    )


def mix(out: Tensor, query: Tensor, means: Tensor, weight: WeightOf) -> Tensor:
    """Mix attention's output with means of values: [s, b, h, d].

    Args:
        out, query: [s, b, h, d].
        means: [s, b, h_kv, d] in `precise` dtype.
    """
    gate = torch.einsum("sbhd,hd->sbh", query, weight("gate_query").to(query.dtype)).to(means.dtype)
    gate = (gate + weight("gate_bias").to(means.dtype)).sigmoid().unflatten(2, (means.shape[2], -1))[..., None]
    means = means[:, :, :, None]
    mixed = means + gate * (out.unflatten(2, (means.shape[2], -1)) - means)
    return mixed.flatten(2, 3).to(out.dtype)


def running_means(value: Tensor, size: int) -> Tensor:
    """Compute the mean of the values up to each token.

    Values and means are [s, b, h_kv, d]; means have the `precise` dtype. Sums run within blocks of `size` tokens, then
    over blocks, as products with triangular matrices: on a GPU `torch.cumsum` is not deterministic, and visits the
    tokens one after another.
    """
    length = value.shape[0]
    values = F.pad(value.to(precise(value.dtype)).flatten(1), (0, 0, 0, -length % size)).unflatten(0, (-1, size))
    within = values.new_ones(size, size).tril() @ values  # [n, size, b * h_kv * d]
    before = values.new_ones(len(values), len(values)).tril(-1) @ within[:, -1]
    sums = (within + before[:, None]).flatten(0, 1)[:length].view(value.shape)
    return sums / torch.arange(1, length + 1, device=value.device)[:, None, None, None]


def mixing_flops(length: int, size: int, shape: AttentionShape) -> int:
    """Count FLOPs of a forward pass over one sequence."""
    blocks = -(-length // size)
    sums = (blocks * size * size + blocks * blocks) * shape.num_query_groups
    return 2 * shape.head_dim * (sums + length * shape.num_heads)


def mixing_bytes(length: int, shape: AttentionShape, element_size: int) -> int:
    """Count bytes that the backward pass of mixing needs, over all heads."""
    of_heads = shape.num_heads * (shape.head_dim * (4 + element_size) + 8)
    return length * (of_heads + 4 * shape.num_query_groups * shape.head_dim)
