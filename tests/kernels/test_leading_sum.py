"""The sum over a first dimension is torch's, rounded once."""

import pytest
import torch
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.leading_sum import leading_sum
from torch import Tensor

repair_interpreter()


def summed(parts: Tensor) -> Tensor:
    out = torch.full_like(parts[0], torch.nan)
    leading_sum(parts, out)
    return out


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 3000), (4, 64, 128), (3, 2048)])
def test_it_is_torchs(shape: tuple[int, ...]) -> None:
    parts = torch.randn(shape, dtype=torch.float64)
    assert (summed(parts) - parts.sum(0)).norm() <= 1e-15 * parts.sum(0).norm()


def test_in_bfloat16_it_rounds_once() -> None:
    parts = torch.randn(4, 4096).bfloat16()
    assert torch.equal(summed(parts), parts.double().sum(0).float().bfloat16())
