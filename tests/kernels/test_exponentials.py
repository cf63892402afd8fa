"""The polynomial of the Hopper kernels' exponentials: its PTX, evaluated by numpy, against float64."""

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

exponentials = pytest.importorskip("s2train.kernels.hopper.exponentials", reason="needs Triton's Gluon")

BFLOAT16_ROUNDING, FLOAT16_ROUNDING = 2.0**-9, 2.0**-12  # largest relative errors
Values = NDArray[np.float32]


def evaluate(software: int, x: Values) -> Values:
    """Run the assembly on [n, 8] numbers; `ex2` is exact."""
    registers: dict[str, NDArray[np.generic]] = {f"${8 + i}": x[:, i] for i in range(8)}

    def value(word: str) -> NDArray[np.generic]:
        if word.startswith("0f"):
            return np.full(len(x), int(word[2:], 16), np.uint32).view(np.float32)
        return registers[word] if word in registers else np.full(len(x), int(word), np.uint32)

    for line in exponentials.assembly(software).strip("{ }").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        operation, to, *of = re.split(r",? +", line.strip())
        operands = [value(word) for word in of]
        exact = [word.astype(np.float64) for word in operands]
        match operation:
            case "ex2.approx.ftz.f32":
                result = np.exp2(exact[0]).astype(np.float32)
            case "max.NaN.f32":
                result = np.maximum(*operands)
            case "add.rm.f32":
                total = exact[0] + exact[1]
                result = total.astype(np.float32)
                result = np.where(result > total, np.nextafter(result, np.float32(-np.inf)), result)
            case "sub.rn.f32":
                result = (exact[0] - exact[1]).astype(np.float32)
            case "fma.rn.f32":
                result = (exact[0] * exact[1] + exact[2]).astype(np.float32)
            case "mov.b32":
                result = operands[0]
            case "shl.b32":
                result = operands[0].view(np.uint32) << operands[1]
            case "add.s32":
                result = operands[0].view(np.uint32) + operands[1].view(np.uint32)
            case _:
                raise AssertionError(line)
        registers[to] = result
    return np.stack([np.ascontiguousarray(registers[f"${i}"]).view(np.float32) for i in range(8)], 1)


def powers(software: int, x: Values) -> Values:
    with np.errstate(invalid="ignore", over="ignore"):
        return evaluate(software, np.resize(x, (-(-len(x) // 8), 8)).astype(np.float32)).flatten()[: len(x)]


@pytest.mark.parametrize("software", range(9))
def test_error_is_far_below_rounding_to_16_bits(software: int) -> None:
    x = torch.cat([torch.rand(100_000) * -126, torch.rand(100_000) * 2.1 - 2])[torch.randperm(200_000)].numpy()
    expected = np.exp2(x.astype(np.float64))
    error = np.abs(powers(software, x) / expected - 1)
    assert error.max() < min(BFLOAT16_ROUNDING / 20, FLOAT16_ROUNDING / 2)
    # the share that the polynomial computes; the rest is exact to float32
    assert (error > 1e-6).mean() == pytest.approx(software / 8, abs=0.03)


def test_masked_scores_and_what_underflows_have_weight_zero() -> None:
    x = np.array([-np.inf, -127.0, -127.5, -1e30, -130.0, -3e38, -128.0, -1e5], np.float32)
    assert (powers(8, x) == 0).all()


def test_whole_numbers_are_exact() -> None:
    x = np.arange(-126, 128, dtype=np.float32)
    assert (powers(8, x) == np.ldexp(np.float32(1), x.astype(np.int32))).all()


def test_what_is_no_number_does_not_become_a_small_weight() -> None:
    measured = powers(8, np.full(8, np.nan, np.float32))
    assert (np.isnan(measured) | (measured > 1e38)).all()
