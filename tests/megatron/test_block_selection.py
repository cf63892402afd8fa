"""The core attention of block selection: dense steps, whose loss trains what, recall, and what decoding reads."""

from typing import Any

import pytest

from tests.program import results_of


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = results_of("tests.megatron.block_selection_program")
    return found


def test_attention_is_dense_in_the_warm_up_alone(measured: dict[str, Any]) -> None:
    found = measured["warm_up"]
    assert found["during"] < 1e-6
    assert found["after"] > 1e-2
    assert found["outside"] == 0


def test_an_evaluation_within_the_warm_up_reads_selected_blocks(measured: dict[str, Any]) -> None:
    assert measured["warm_up"]["evaluated"] == 0


def test_in_the_warm_up_the_scorer_learns_from_the_probability_of_all_rows(measured: dict[str, Any]) -> None:
    found = measured["warm_up"]
    assert found["recorded"] == pytest.approx(found["oracle"], rel=1e-5)
    assert 0 < found["recorded"]["recall"] < 1


def test_no_later_token_of_a_block_changes_an_earlier_output(measured: dict[str, Any]) -> None:
    found = measured["changed_before"]
    assert len(found) == 3 * 2 * 2
    assert set(found.values()) == {0}, found


CASES = pytest.mark.parametrize(
    "case", [f"{scorer}, {phase}" for scorer in ("index", "sea") for phase in ("warm-up", "selected")]
)


@CASES
def test_the_language_models_loss_sends_no_gradient_into_the_scorer(measured: dict[str, Any], case: str) -> None:
    found = measured["gradients"][case]
    assert max(found["without the loss"]) == 0
    assert min(found["with the loss"]) > 0


@CASES
def test_the_scorers_loss_trains_queries_and_keys_only_if_asked(measured: dict[str, Any], case: str) -> None:
    found = measured["gradients"][case]
    assert found["trunk"] == [True, True, True]
    assert found["trunk asked"] == [False, False, True]


def test_its_kernels_run_before_the_model_exists(measured: dict[str, Any]) -> None:
    assert measured["compiled"] == [True] * 6


def test_short_sequences_read_everything(measured: dict[str, Any]) -> None:
    assert all(error < 1e-6 for error in measured["short"])


def test_lists_of_all_blocks_recall_everything(measured: dict[str, Any]) -> None:
    assert measured["recall"] == pytest.approx([1, 1])


def test_a_scorer_that_learns_nothing_computes_recall_in_logged_steps_alone(measured: dict[str, Any]) -> None:
    found = measured["unlogged"]
    assert [found[f"moba, {phase}"]["recorded"] for phase in ("warm-up", "selected")] == [[], []]
    assert found["index, selected"]["recorded"] == found["index, warm-up"]["recorded"] == ["kl", "recall"]
    assert all(all(case["same"]) for case in found.values())


def test_a_step_of_the_warm_up_scores_once_if_it_learns_or_logs_recall(measured: dict[str, Any]) -> None:
    assert measured["scorings"] == {"moba": [1, 0], "index": [1, 1], "sea": [1, 1]}


def test_a_step_never_waits_for_the_device(measured: dict[str, Any]) -> None:
    assert measured["waits"] == {
        f"{name}, {phase}": [] for name in ("moba", "index", "sea") for phase in ("warm-up", "selected")
    }


def test_lists_do_not_depend_on_how_many_rows_are_scored_at_once(measured: dict[str, Any]) -> None:
    assert all(measured["in_chunks"].values()), measured["in_chunks"]


def test_decoding_after_a_prompt_in_chunks_equals_the_uncached_pass_over_forty_blocks(measured: dict[str, Any]) -> None:
    assert all(error < 5e-6 for error in measured["decoding"].values()), measured["decoding"]


def test_blocks_of_new_tokens_are_selected_as_in_the_uncached_pass(measured: dict[str, Any]) -> None:
    found = measured["decoding of new blocks"]
    assert all(error < 5e-6 for error in found.values()), found


def test_a_decoding_step_reads_the_listed_pages_and_a_small_state(measured: dict[str, Any]) -> None:
    found = measured["reads"]
    assert found["pages"] + found["own"] < found["counted"] <= found["pages"] + found["own"] + found["state"]
    assert found["pages"] < found["dense"]
