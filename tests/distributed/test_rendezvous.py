"""What one rank of a job refuses before there is a process group ends all of them."""

from datetime import timedelta
from typing import Any

import pytest
import torch

from s2train.distributed import rendezvous as meeting
from s2train.distributed.rendezvous import arrive, check_alone, check_ranks, fail_together
from s2train.errors import ConfigError, MissingRankError, StartUpError
from tests.threads import in_threads


def meet(refusals: list[str]) -> list[Any]:
    """What `arrive` ends with on each rank, ranks being threads: the problems told, or nothing."""
    store, ends = torch.distributed.HashStore(), {}

    def one(rank: int) -> None:
        try:
            arrive(store, rank, len(refusals), refusals[rank])
            ends[rank] = []
        except StartUpError as error:
            ends[rank] = error.problems

    in_threads(len(refusals), one)
    return [ends[rank] for rank in range(len(refusals))]


def test_ranks_that_refuse_nothing_go_on() -> None:
    assert meet(["", "", ""]) == [[], [], []]


def test_what_all_refuse_is_told_once() -> None:
    assert meet(["train.steps=-1"] * 3) == [["train.steps=-1"]] * 3


def test_what_a_later_rank_refuses_alone_is_told_with_its_rank_and_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "beta")
    assert meet(["", "parallel.tp=3", "parallel.tp=3"]) == [["rank 1 on beta: parallel.tp=3"]] * 3


def test_rank_0_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "ARRIVAL", timedelta(seconds=0.2))
    with pytest.raises(MissingRankError):
        arrive(torch.distributed.HashStore(), 0, 2, "train.steps=-1")


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
def test_an_environment_in_which_ranks_cannot_meet_is_rejected(
    given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    with pytest.raises(ConfigError, match=rf"^{words}.*launch/job.py.*unset"):
        check_ranks()


@pytest.mark.parametrize(
    "given", [{}, {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}, {"WORLD_SIZE": "1"}]
)
def test_an_environment_in_which_ranks_can_meet_is_taken(
    given: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", given)
    check_ranks()


def test_a_program_of_one_process_is_not_started_as_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_alone()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2: this program runs in one process"):
        check_alone()


def test_a_job_of_one_refuses_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"seed=-1"), fail_together():
        raise ConfigError("seed", -1, "is out of range", "Set another")


def test_a_run_folder_that_another_job_holds_is_not_refused_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError), fail_together():
        raise ConfigError("run_dir", "a", "another job is at work there", "Wait for it") from BlockingIOError()
