"""Splitting and rotating a projection in one kernel is the oracle's, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.reference import reference_split_heads
from s2train.kernels.split_heads import split_heads
from torch import Tensor

repair_interpreter()
CASES = {  # tokens, sequences, KV heads, query heads of each, d, rotated dimensions
    "grouped heads": (37, 1, 2, 3, 16, 16),
    "two sequences": (9, 2, 2, 2, 8, 8),
    "one KV head": (7, 2, 1, 4, 8, 8),
    "a query head of each KV head": (5, 1, 3, 1, 8, 8),
    "half of the dimensions": (6, 2, 2, 2, 16, 8),
    "no power of two": (6, 1, 2, 2, 12, 12),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensor, int, Tensor, Tensor]:
    length, batch, kv_heads, group, dim, turning = request.param
    angles = 6 * torch.rand(length * batch, turning // 2, dtype=torch.float64)
    return torch.randn(length, batch, kv_heads, (group + 2) * dim, dtype=torch.float64), dim, angles.cos(), angles.sin()


def results(
    function: Callable[..., tuple[Tensor, ...]], packed: Tensor, dim: int, cos: Tensor, sin: Tensor
) -> list[Tensor]:
    """Outputs, and the gradient of a weighting whose strides are those of [b, s, h, d]."""
    leaf = packed.clone().requires_grad_()
    outs = function(leaf, dim, cos, sin)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(x.transpose(0, 1).shape, generator=generator).bfloat16().to(x.dtype).transpose(0, 1) for x in outs
    ]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaf, weights)]


def test_it_is_the_oracles(case: tuple[Tensor, int, Tensor, Tensor]) -> None:
    for found, expected in zip(results(split_heads, *case), results(reference_split_heads, *case), strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-15 * expected.norm()


def test_in_bfloat16_it_rounds_once(case: tuple[Tensor, int, Tensor, Tensor]) -> None:
    packed, dim, *tables = case
    packed, tables = packed.bfloat16(), [x.float() for x in tables]
    expected = results(reference_split_heads, packed.float(), dim, *tables)
    for found, exact in zip(results(split_heads, packed, dim, *tables), expected, strict=True):
        assert (found - exact.bfloat16()).norm() <= 1e-3 * exact.norm()


def test_values_are_a_view() -> None:
    packed, tables = torch.randn(3, 1, 2, 4 * 8), torch.ones(2, 3, 4)
    assert split_heads(packed, 8, *tables)[2].data_ptr() == packed[..., 3 * 8 :].data_ptr()
