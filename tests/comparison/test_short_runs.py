"""Short runs say what a step's time went to, as `profile.steps` does, and free their models."""

import json
from typing import Any

import pytest
import torch

from tests.program import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="reads the trace of a CPU")]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    done = run("tests.comparison.short_run_program", processes=0)
    assert done.status == 0, done.err[-3000:]
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


def test_attention_and_the_optimizer_are_parts_of_their_own(measured: dict[str, Any]) -> None:
    passes = {f"attention {kind} {way}" for kind in ("dense", "s2") for way in ("forward", "backward")}
    assert passes | {"linear layers", "norms, elementwise, loss", "optimizer"} <= measured["parts"].keys()


def test_the_next_run_finds_no_parameter_of_the_last(measured: dict[str, Any]) -> None:
    assert measured["parameters"] == 0
