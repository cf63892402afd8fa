"""Short runs say what a step's time went to, as `profile.steps` does."""

import json

import pytest
import torch

from tests.program import run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="reads the trace of a CPU")]


def test_attention_and_the_optimizer_are_parts_of_their_own() -> None:
    done = run("tests.comparison.short_run_program", processes=0)
    assert done.status == 0, done.err[-3000:]
    passes = {f"attention {kind} {way}" for kind in ("dense", "s2") for way in ("forward", "backward")}
    assert (
        passes | {"linear layers", "norms, elementwise, loss", "optimizer"}
        <= json.loads(done.out.splitlines()[-1]).keys()
    )
