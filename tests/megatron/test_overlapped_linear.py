"""Linear layers that communicate while they compute give what Megatron's do."""

import random
from typing import Any

import pytest

from tests.program import results_of

RANKS = 2


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    seed = str(random.randrange(2**31))
    print("seed", seed)
    return dict(results_of("tests.megatron.overlapped_linear_program", seed, str(RANKS), processes=RANKS))


def test_outputs_and_gradients_are_megatrons(found: dict[str, Any]) -> None:
    """In fp32, with weight gradients summed by torch or in buffers, recomputed, and without gradients."""
    assert len(found["errors"]) == 3
    for case, errors in found["errors"].items():
        assert len(errors) == 5, case
        assert all(error < 1e-6 for error in errors.values()), (case, errors)


def test_all_linear_layers_of_a_run_do(found: dict[str, Any]) -> None:
    assert [name.rpartition(".")[2] for name in sorted(found["layers"]["of a run"])] == [
        "linear_fc1", "linear_fc2", "linear_proj", "linear_qkv", "output_layer",
    ]  # fmt: skip


@pytest.mark.parametrize("case", ["without overlap", "decoding"])
def test_no_layer_does(found: dict[str, Any], case: str) -> None:
    assert found["layers"][case] == []


def test_inputs_are_gathered_ahead_of_gradients(found: dict[str, Any]) -> None:
    """The row-parallel layer's backward gathers its gradient, then the column-parallel layer's input."""
    forward, backward = found["exchanges"]["forward"], found["exchanges"]["backward"]
    assert forward == ["gather", "scatter"]
    assert backward == ["gather", "gather", "between", "scatter"]


def test_nothing_of_a_finished_pass_is_kept(found: dict[str, Any]) -> None:
    assert found["kept"] == {"after its backward": False, "without a backward": False}


def test_gradients_of_some_weights_leave_the_others_right(found: dict[str, Any]) -> None:
    """An input gathered ahead in vain doesn't disturb the exchanges that follow."""
    assert found["errors after a part"] < 1e-6
