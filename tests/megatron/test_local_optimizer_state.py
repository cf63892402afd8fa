"""What a rank reads of the optimizer's state, and writes. That loaded runs continue alike: test_resume.py."""

from typing import Any

import pytest

from tests.program import results_of

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved")
    found: list[dict[str, Any]] = results_of("tests.training.loading_program", str(folder), processes=2)
    return found


def test_a_rank_asks_for_the_states_of_its_own_parameters_and_copies_none(ranks: list[dict[str, Any]]) -> None:
    states = 3
    assert sum(rank["kept"] for rank in ranks) >= ranks[0]["parameters"]
    for rank in ranks:
        # whole parameters: one at each end of a rank's share may be another's too
        assert states * rank["kept"] <= rank["asked"] <= states * (rank["kept"] + 2 * rank["largest"])
        assert rank["asked"] < 0.9 * states * rank["parameters"]
        assert not rank["is_copied"]


def test_states_behind_a_padded_bucket_are_saved_as_those_of_their_parameters(ranks: list[dict[str, Any]]) -> None:
    assert [rank["saved_elsewhere"] for rank in ranks] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_states_that_an_earlier_version_saved_shifted_are_rejected(ranks: list[dict[str, Any]], precision: str) -> None:
    for rank in ranks:
        assert rank["errors"][precision] == ""
        assert "its fp32 weights are not those of its model" in rank["errors"][f"{precision} shifted"]
        assert "checkpoint.weights_only=true" in rank["errors"][f"{precision} shifted"]


def test_a_rank_reads_the_checkpoints_index_once_before_megatron_does(ranks: list[dict[str, Any]]) -> None:
    assert [set(rank["index_reads"].values()) for rank in ranks] == [{1}, {1}]
