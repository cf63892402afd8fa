"""The plan against the real model: what Megatron builds, and the most that autograd holds at once."""

import json

import pytest

from tests.program import results_of

pytestmark = [pytest.mark.slow]

VARIANTS = [
    ["+model=tiny_dense"],
    ["+model=tiny_hybrid", "model.tie_embeddings=false", "model.head_dim=16"],
    ["+model=tiny_hybrid", "model.qk_norm=true"],
    ["+model=tiny_hybrid", "train.recompute=selective", "train.micro_batch_size=4"],
    ["+model=tiny_hybrid", "train.recompute=mlp", "train.micro_batch_size=4"],
    ["+model=tiny_hybrid", "train.recompute=full", "train.recompute_num_layers=2"],
]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, list[int]]]:
    found: list[dict[str, list[int]]] = results_of("tests.planning.saved_bytes_program", json.dumps(VARIANTS))
    return found


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: " ".join(VARIANTS[i]))
def test_parameters_are_those_of_the_model_that_is_built(measured: list[dict[str, list[int]]], variant: int) -> None:
    built, planned = measured[variant]["parameters"]
    assert planned == built


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=lambda i: " ".join(VARIANTS[i]))
def test_activations_are_estimated_closely_from_above(measured: list[dict[str, list[int]]], variant: int) -> None:
    saved, planned = measured[variant]["activations"]
    assert 0.8 * planned < saved <= planned
