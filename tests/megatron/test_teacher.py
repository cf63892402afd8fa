"""Scorers learn from a frozen dense model: its probabilities, and nothing else of it."""

from typing import Any

import pytest

from tests.program import results_of

PHASES = pytest.mark.parametrize("phase", ["warm-up", "selected"])


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = results_of("tests.megatron.teacher_program")
    return found


@PHASES
def test_losses_and_recall_are_those_of_the_teachers_queries_and_keys(measured: dict[str, Any], phase: str) -> None:
    found = measured["against_oracle"][phase]
    for name, expected in found["expected"].items():
        assert found["recorded"][name] == pytest.approx(expected, rel=1e-4), name


@PHASES
def test_another_models_probabilities_differ_from_the_layers_own(measured: dict[str, Any], phase: str) -> None:
    found = measured["against_oracle"][phase]
    for name in ("kl", "mse"):
        assert all(one != other for one, other in zip(found["recorded"][name], found["alone"][name], strict=True)), name


def test_a_teacher_of_the_students_weights_gives_the_bits_of_its_own_attention(measured: dict[str, Any]) -> None:
    assert measured["of_equal_weights"]["taught"] == measured["of_equal_weights"]["alone"]


def test_a_recomputed_forward_pass_learns_from_the_same_target(measured: dict[str, Any]) -> None:
    assert len(measured["recomputed"]) == 4
    assert all(measured["recomputed"].values()), measured["recomputed"]


def test_a_teacher_is_frozen_and_no_part_of_the_students_state(measured: dict[str, Any]) -> None:
    assert measured["frozen"] == dict.fromkeys(measured["frozen"], False)


def test_an_evaluation_needs_no_teacher(measured: dict[str, Any]) -> None:
    assert measured["evaluated"]


def test_a_training_step_without_the_teachers_pass_fails(measured: dict[str, Any]) -> None:
    assert measured["untaught"] == "layout.kinds.B.teacher=dense: the teacher must run before this"
