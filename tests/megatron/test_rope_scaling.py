"""Scaled rotations are the papers', in training, in Liger-Kernel's kernel and over a cache; temperature once."""

import random

import pytest

from tests.program import results_of


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    program, seed = "tests.megatron.rope_scaling_program", str(random.randrange(2**31))
    found: dict[str, dict[str, float]] = results_of(program, seed, interpret=True)
    assert len(found) == 8
    return found


def test_queries_and_keys_turn_by_the_papers_angles_and_grow_by_the_temperature(
    errors: dict[str, dict[str, float]],
) -> None:
    # fp32 angles of some tens of radians, and one rounding; a temperature applied twice or not would be 1e-1
    assert all(of["plain"] < 2e-6 for of in errors.values()), errors


def test_liger_kernels_rotation_does_too(errors: dict[str, dict[str, float]]) -> None:
    found = [of["liger"] for of in errors.values() if "liger" in of]
    if not found:
        pytest.skip("Liger-Kernel isn't installed")
    assert all(error < 2e-6 for error in found), errors


def test_decoding_over_a_cache_is_decoding_without(errors: dict[str, dict[str, float]]) -> None:
    found = [of["cached"] for of in errors.values() if "cached" in of]
    assert len(found) == 4
    assert all(error < 2e-5 for error in found), errors
