"""Measures HyperAttention's error by number of samples, on synthetic and model inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2train.kernels.dense import dense_causal_attention
from s2train.kernels.hyper import HyperSettings, hyper_attention

_CLUSTERS, _NORM, _SPREAD = 32, 8.5, 0.3  # most of a query's mass is on keys of its cluster


@dataclass(frozen=True)
class Inputs:
    """Queries, keys and values [s, b, h, d] to measure errors on."""

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def on(self, device: torch.device) -> "Inputs":
        """Move the tensors."""
        return replace(self, query=self.query.to(device), key=self.key.to(device), value=self.value.to(device))


@dataclass(frozen=True)
class Error:
    """Relative error with `samples` keys an interval.

    It is the norm of the difference over the norm of exact attention, past `shortest`.
    """

    inputs: str
    samples: int
    relative: float


def synthetic(length: int, heads: int, dim: int, seed: int) -> list[Inputs]:
    """Draw Gaussian inputs and clustered ones.

    Queries and keys of clustered inputs lie around shared centres.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    value = normal(length, 1, heads, dim)
    centres = torch.nn.functional.normalize(normal(_CLUSTERS, dim), dim=-1) * _NORM
    query, key = (
        centres[torch.randint(_CLUSTERS, (length, 1, heads), generator=generator)] + _SPREAD * normal(*value.shape)
        for _ in range(2)
    )
    of_keys = value + key @ normal(dim, dim) / dim**0.5  # values that depend on their keys
    return [
        Inputs("Gaussian", normal(*value.shape), normal(*value.shape), value, dim**-0.5),
        Inputs("clustered", query, key, of_keys, dim**-0.5),
    ]


@torch.no_grad()
def errors(inputs: Inputs, settings: HyperSettings, samples: Sequence[int], draws: int) -> list[Error]:
    """Compare with exact attention, over independent draws of directions and samples."""
    exact = dense_causal_attention(inputs.query, inputs.key, inputs.value, softmax_scale=inputs.scale)
    exact = exact[settings.shortest :].double()
    found = []
    for number in samples:
        squares = 0.0
        for draw in range(draws):
            seeds = torch.arange(inputs.key.shape[2], device=exact.device) + 1000 * draw
            out = hyper_attention(
                inputs.query, inputs.key, inputs.value, replace(settings, samples=number), seeds, seeds + 500,
                softmax_scale=inputs.scale,
            )  # fmt: skip
            squares += float((out[settings.shortest :].double() - exact).square().sum()) / draws
        found.append(Error(inputs.name, number, (squares / float(exact.square().sum())) ** 0.5))
    return found
