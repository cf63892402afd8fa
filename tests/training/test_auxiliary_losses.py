"""Auxiliary losses weigh as their weights say, however many tokens count in the language model's loss."""

import pytest

from tests.program import results_of


def test_masked_tokens_change_no_gradient_of_an_auxiliary_loss() -> None:
    found = results_of("tests.training.auxiliary_program")
    expected = found["every token"]["1"]
    assert max(map(abs, expected)) > 0
    for name, by_size in found.items():
        for size, gradients in by_size.items():
            assert gradients == pytest.approx(expected, rel=1e-3, abs=1e-7), (name, size)
