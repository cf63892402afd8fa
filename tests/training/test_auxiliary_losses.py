"""Auxiliary losses weigh as their weights say, however many tokens count in the language model's loss."""

import json
import random
from typing import Any

import pytest
import torch
from s2train.kernels.relative_error import relative_error

from tests.program import results_of

TOLERANCE = 1e-5  # of another division, in fp32; differences of 36 runs were 2e-6 at most

Gradients = dict[str, list[float]]


def test_masked_tokens_change_no_gradient_of_an_auxiliary_loss() -> None:
    found = results_of("tests.training.auxiliary_program")
    expected = found["every token"]["1"]
    assert max(map(abs, expected)) > 0
    for name, by_size in found.items():
        for size, gradients in by_size.items():
            assert gradients == pytest.approx(expected, rel=1e-3, abs=1e-7), (name, size)


def gradients(seed: int, division: dict[str, Any], micro_batch_size: int, processes: int) -> Gradients:
    case = json.dumps([seed, division, micro_batch_size])
    found: Gradients = results_of("tests.training.masked_ranks_program", case, processes=processes)
    return found


@pytest.fixture(scope="module")
def alone() -> tuple[int, Gradients]:
    """The seed of the tokens, and the gradients of one process."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return seed, gradients(seed, {}, 1, processes=1)


@pytest.mark.parametrize(
    ("division", "micro_batch_size"),
    [({}, 1), ({}, 2), ({"cp": 2}, 1), ({"cp": 2}, 4)],
    ids=["data parallel, accumulated", "data parallel", "context parallel, accumulated", "context parallel"],
)
def test_ranks_with_other_numbers_of_masked_tokens_have_the_gradients_of_one_process(
    alone: tuple[int, Gradients], division: dict[str, Any], micro_batch_size: int
) -> None:
    seed, expected = alone
    found = gradients(seed, division, micro_batch_size, processes=2)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(torch.tensor(gradient), torch.tensor(expected[name])) < TOLERANCE, name
