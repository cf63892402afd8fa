"""Jobs run once: their results are recorded as each ends."""

import json
import re
import shutil
import threading
from pathlib import Path
from threading import Barrier

import pytest
import torch

from s2train.errors import ConfigError
from s2train.scaling.jobs import Job, Runner
from s2train.scaling.launchers import Launch
from s2train.scaling.recorded import Recorded
from s2train.scaling.resumption import resumption
from tests.scaling.fake_ranks import FakeRanks

RECORDS = [{"step": 1, "loss": 2.0}]


def runner(folder: Path, ranks: FakeRanks) -> Runner:
    """A new one each time, as a repeated command makes it."""
    return Runner(folder / "runs", 2, Recorded(folder / "jobs.json"), ranks, ["model.vocab_size=512"])


def test_the_same_jobs_again_run_only_failed_ones(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS, failing={"b"})
    jobs = [Job("a", 1, ()), Job("b", 2, ())]
    first = runner(tmp_path, ranks).run(jobs)
    assert first["b"].error is not None
    assert first["b"].error.startswith("OutOfMemoryError: too little; see ")
    ranks.failing.clear()
    again = runner(tmp_path, ranks).run(jobs)
    assert again["b"].error is None
    assert ranks.names == ["a", "b", "b"]
    assert again["a"].losses == [2.0]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (None, "ran past its limit of 300 s, which --timeout sets; see "),
        (-9, "a rank was ended by SIGKILL, perhaps because memory ran out; see "),
        (-6, "a rank was ended by SIGABRT; see "),
        (3, "ended with status 3; see "),
    ],
)
def test_a_job_that_printed_no_error_says_how_it_ended(status: int | None, error: str, tmp_path: Path) -> None:
    found = runner(tmp_path, FakeRanks(status=status)).run([Job("a", 2, ())])["a"].error
    assert found is not None
    assert found.startswith(error)


def test_jobs_on_half_of_the_devices_run_side_by_side_on_separate_ones(tmp_path: Path) -> None:
    places, both = {}, Barrier(2, timeout=400)

    class Waiting(FakeRanks):
        def __call__(self, launch: Launch) -> int | None:
            if launch.processes == 2:
                both.wait()  # for the other one
            places[launch.log.stem] = launch.environment["CUDA_VISIBLE_DEVICES"]
            return super().__call__(launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
        four = Runner(tmp_path / "runs", 4, Recorded(tmp_path / "jobs.json"), Waiting(RECORDS))
        four.run([Job("all", 4, ()), Job("a", 2, ()), Job("b", 2, ())])
    assert places == {"a": "4,5", "b": "6,7", "all": "4,5,6,7"}


def test_results_are_recorded_before_the_next_job_starts(tmp_path: Path) -> None:
    seen = []

    class Watching(FakeRanks):
        def __call__(self, launch: Launch) -> int | None:
            path = tmp_path / "jobs.json"
            seen.append(list(json.loads(path.read_text())) if path.is_file() else [])
            return super().__call__(launch)

    for _ in runner(tmp_path, Watching(RECORDS)).run_each([Job(name, 2, ()) for name in "abc"]):
        pass
    assert seen == [[], ["a"], ["a", "b"]]


def test_recorded_results_suffice_without_the_run_folders(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    runner(tmp_path, ranks).run([Job("a", 2, ())])
    shutil.rmtree(tmp_path / "runs")
    assert runner(tmp_path, ranks).run([Job("a", 2, ())])["a"].losses == [2.0]
    assert ranks.names == ["a"]


def test_a_job_whose_checkpoint_is_lost_runs_again_and_so_do_those_that_start_from_it(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    start = Job("start", 1, ("train.exit_step=3",), saves=(3,))
    jobs = [Job("later", 2, (), after="start"), Job("other", 2, ())]
    for _ in range(2):
        for each in ([start], jobs):
            runner(tmp_path, ranks).run(each)
    assert ranks.names == ["start", "later", "other"]
    shutil.rmtree(tmp_path / "runs" / "start")
    for each in ([start], jobs):
        runner(tmp_path, ranks).run(each)
    assert ranks.names[3:] == ["start", "later"]


def test_an_interrupted_command_starts_no_further_job(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    outcomes = runner(tmp_path, ranks).run_each([Job(str(number), 2, ()) for number in range(50)])
    next(outcomes)
    outcomes.close()
    assert len(ranks.started) < 50


def test_an_interrupted_command_ends_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = threading.Event()

    class Endless(FakeRanks):
        def __call__(self, launch: Launch) -> int | None:
            if launch.program[-1].endswith("endless"):
                runs.set()
                assert launch.stopped.wait(10)
                return None
            return super().__call__(launch)

    ranks = Endless(RECORDS)
    outcomes = runner(tmp_path, ranks).run_each([Job("quick", 1, ()), Job("endless", 1, ())])
    next(outcomes)
    assert runs.wait(10)
    outcomes.close()
    assert "endless: interrupted" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "jobs.json").read_text())) == ["quick"]


def test_settings_of_the_command_come_after_those_of_the_job(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    runner(tmp_path, ranks).run([Job("a", 2, ("model.vocab_size=256",))])
    assert ranks.started == [("a", 2, ["model.vocab_size=256", "model.vocab_size=512"])]


def of_settings(folder: Path, ranks: FakeRanks, *settings: str) -> Runner:
    return Runner(folder / "runs", 4, Recorded(folder / "jobs.json"), ranks, settings)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("elementwise=liger", "elementwise=liger: runs of --resume need elementwise=torch"),
        ("+model=1b_dense", "model=1b_dense: runs of --resume need model=125m_hybrid"),
        ("parallel.cp=2", "parallel.cp=2: runs of --resume need its default"),
        ("parallel.pp=4", "parallel.pp=4: runs of --resume need parallel.pp=4 or parallel.pp=2"),
    ],
)
def test_a_setting_that_would_change_what_is_compared_is_rejected(setting: str, line: str, tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    with pytest.raises(ConfigError, match=rf"^{re.escape(line)}\. Leave it out"):
        resumption(of_settings(tmp_path, ranks, setting), "125m_hybrid")
    assert ranks.started == []


@pytest.mark.parametrize("setting", ["+model=125m_hybrid", "optim.warmup_steps=1", "model.vocab_size=512"])
def test_a_setting_that_all_runs_share_is_accepted(setting: str, tmp_path: Path) -> None:
    resumption(of_settings(tmp_path, FakeRanks(RECORDS), setting), "125m_hybrid")


def test_runs_named_by_their_exchange_keep_it(tmp_path: Path) -> None:
    ranks = FakeRanks(RECORDS)
    runner = of_settings(tmp_path, ranks, "parallel.cp_exchange=auto")
    jobs = [Job("blocks", 4, ("parallel.cp=4",)), Job("gather", 4, ("parallel.cp=4", "parallel.cp_exchange=gather"))]
    runner.check("parity", jobs)
    runner.run(jobs)
    last = {name: [word for word in settings if "cp_exchange" in word][-1] for name, _, settings in ranks.started}
    assert last == {"blocks": "parallel.cp_exchange=auto", "gather": "parallel.cp_exchange=gather"}


@pytest.mark.parametrize("content", ["", "3"])
def test_a_damaged_file_of_finished_jobs_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^OUTPUT=.*jobs\.json: holds no results of this program"):
        Recorded(tmp_path / "jobs.json")
