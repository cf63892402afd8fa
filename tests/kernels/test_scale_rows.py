"""Rows are multiplied by their factors in fp32, and rounded once."""

import pytest
import torch
from s2train.kernels.interpreter import repair_interpreter
from s2train.kernels.scale_rows import scale_rows

repair_interpreter()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4096), (5, 8191)])
def test_each_row_gets_its_factor(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, factors = torch.randn(shape, dtype=dtype), torch.randn(shape[0])
    expected = (x.float() * factors[:, None]).to(dtype)
    scale_rows(x, factors)
    assert torch.equal(x, expected)


def test_a_step_between_factors_is_followed() -> None:
    x, factors = torch.ones(4, 3), torch.arange(8.0)[::2]
    scale_rows(x, factors)
    assert x[:, 0].tolist() == [0, 2, 4, 6]
