"""If one rank rejects its configuration before there is a process group, all ranks exit."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from s2train.distributed import rendezvous
from s2train.distributed.rendezvous import check_ranks, check_single_process, fail_together, wait_for_all_ranks
from s2train.errors import ConfigError, MissingRankError, StartUpError
from tests.threads import in_threads


def start(problems: list[str]) -> list[Any]:
    """The problems that `wait_for_all_ranks` raises on each rank (a thread), or nothing."""
    store, ends = torch.distributed.HashStore(), {}

    def one(rank: int) -> None:
        try:
            wait_for_all_ranks(store, rank, len(problems), problems[rank])
            ends[rank] = []
        except StartUpError as error:
            ends[rank] = error.problems

    in_threads(len(problems), one)
    return [ends[rank] for rank in range(len(problems))]


def test_ranks_without_problems_continue() -> None:
    assert start(["", "", ""]) == [[], [], []]


def test_a_problem_of_all_ranks_is_reported_once() -> None:
    assert start(["train.steps=-1"] * 3) == [["train.steps=-1"]] * 3


def test_a_problem_of_a_later_rank_is_reported_with_rank_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "beta")
    assert start(["", "parallel.tp=3", "parallel.tp=3"]) == [["rank 1 on beta: parallel.tp=3"]] * 3


def test_rank_0_waits_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "START_TIMEOUT", timedelta(seconds=0.2))
    with pytest.raises(MissingRankError):
        wait_for_all_ranks(torch.distributed.HashStore(), 0, 2, "train.steps=-1")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: "),
        ({"RANK": "3"}, "RANK=3: ranks are 0 to WORLD_SIZE - 1 = 0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: not a whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: not a whole number"),
    ],
    ids=str,
)
def test_an_environment_in_which_ranks_cannot_connect_is_rejected(
    given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    with pytest.raises(ConfigError, match=rf"^{words}.*launch/job.py.*unset"):
        check_ranks()


@pytest.mark.parametrize(
    "given", [{}, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}, {"WORLD_SIZE": "1"}]
)
def test_an_environment_in_which_ranks_can_connect_is_accepted(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    check_ranks()


def test_a_program_of_one_process_is_not_started_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_single_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: this program runs in one process"):
        check_single_process()


def test_a_job_of_one_process_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"seed=-1"), fail_together():
        raise ConfigError("seed", -1, "is out of range", "Set another")


def test_a_run_folder_that_another_job_holds_is_not_rejected_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError), fail_together():
        raise ConfigError("run_dir", "a", "another job is at work there", "Wait for it") from BlockingIOError()
