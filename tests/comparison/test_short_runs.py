"""Short runs say what a step's time went to, as `profile.steps` does, and free their models."""

from typing import Any

import pytest
import torch

from tests.program import results_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="reads the trace of a CPU")]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = results_of("tests.comparison.short_run_program")
    return found


def test_attention_and_the_optimizer_are_parts_of_their_own(measured: dict[str, Any]) -> None:
    passes = {f"attention {kind} {way}" for kind in ("dense", "s2") for way in ("forward", "backward")}
    assert passes | {"linear layers", "norms, elementwise, loss", "optimizer"} <= measured["parts"].keys()


def test_the_next_run_finds_no_parameter_of_the_last(measured: dict[str, Any]) -> None:
    assert measured["parameters"] == 0
