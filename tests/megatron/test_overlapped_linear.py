"""Linear layers that communicate by chunks of the sequence compute what Megatron's do."""

import json
import random
from typing import Any

import pytest

from tests.program import run

RANKS = 2


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    seed = str(random.randrange(2**31))
    print("seed", seed)
    done = run("tests.megatron.overlapped_linear_program", seed, str(RANKS), processes=RANKS)
    assert done.status == 0, done.err[-3000:]
    return dict(json.loads(done.out.splitlines()[-1]))


def test_outputs_and_gradients_are_megatrons(found: dict[str, Any]) -> None:
    """In fp32, with weight gradients summed by torch or in buffers, recomputed, and without gradients."""
    assert len(found["errors"]) == 9
    for case, errors in found["errors"].items():
        assert len(errors) == 5, case
        assert max(errors.values()) < 1e-6, (case, errors)


def test_each_chunk_is_communicated_while_another_is_multiplied(found: dict[str, Any]) -> None:
    column, row, row_backward = found["order"]
    assert column == "gather " + 3 * "gather multiply " + "multiply"
    assert row == " ".join(4 * ["multiply scatter"])
    assert row_backward == "gather " + 3 * "gather multiply sum " + "multiply sum"


def test_all_linear_layers_of_a_run_do(found: dict[str, Any]) -> None:
    without, layers = found["layers"]
    assert not without
    assert [name.rpartition(".")[2] for name in sorted(layers)] == [
        "linear_fc1", "linear_fc2", "linear_proj", "linear_qkv", "output_layer",
    ]  # fmt: skip
