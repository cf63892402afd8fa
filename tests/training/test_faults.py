"""After any fault, a run resumes from its last good checkpoint with the results of an uninterrupted run."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from s2train.checkpoints.folders import read_progress
from s2train.checkpoints.integrity import damage
from s2train.checkpoints.listing import checkpoints_in
from s2train.errors import EXIT_REQUEUE
from s2train.training.records import read_records
from tests.program import PRELOADED, ROOT, SMALL, UNSAVED, Outcome, error_line, launch, pretrain, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]

STEPS = "train.steps=6"
EVERY_STEP = "checkpoint.interval=1"
TORCHRUN = "torch.distributed.run"


def planted(
    fault: str, run_dir: Path, *arguments: str, launcher: str = "", restarts: int = 0, shown: str = ""
) -> Outcome:
    """Train the small model on two processes with a fault from tests/training/planted.py.

    Args:
        shown: of a launcher: the local rank whose output alone is shown, as launch/multinode.sh does.
    """
    program = [str(ROOT / "tests" / "training" / "planted.py"), *SMALL, f"run_dir={run_dir}", *arguments]
    if not launcher:
        with mock.patch.dict(os.environ, S2TRAIN_TEST_FAULT=fault):
            return run(*program, processes=2)
    job = [launcher, "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    if shown:
        job += ["--log-dir", str(run_dir / "log"), "--tee", "3", "--local-ranks-filter", shown]
    return launch(*job, *program, S2TRAIN_TEST_FAULT=fault)


def trace(run_dir: Path) -> list[dict[str, Any]]:
    """What a run reports about its steps, except their times."""
    names = ("step", "loss", "held_out_loss", "grad_norm", "lr", "skipped")
    records = [record for record in read_records(run_dir / "metrics.jsonl") if "loss" in record]
    return [{name: record.get(name) for name in names} for record in records]


@pytest.mark.xdist_group("kills")
@pytest.mark.parametrize(
    ("kills", "in_background"),
    [
        pytest.param(2, False, id="2, saved at once"),
        pytest.param(4, True, id="4, saved in the background", marks=pytest.mark.long),
        pytest.param(40, False, id="40, saved at once", marks=pytest.mark.long),
        pytest.param(40, True, id="40, saved in the background", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(
    kills: int, in_background: bool, tmp_path: Path
) -> None:
    third = 2 * kills  # an attempt takes five steps at most
    settings = [f"train.steps={3 * third}", EVERY_STEP, "checkpoint.keep=2", f"checkpoint.keep_every={third}"]
    settings += [
        f"evaluation.interval={3 * third}",
        "evaluation.batches=1",
        f"checkpoint.async_save={str(in_background).lower()}",
        "tracking.log_interval=3",  # reports are means over steps before and after a kill
    ]
    seed = random.randrange(1 << 30)
    program = [
        str(ROOT / "tests" / "training" / "killed.py"),
        str(seed),
        str(kills),
        *SMALL,
        f"run_dir={tmp_path / 'killed'}",
    ]
    done = launch(*program, *settings)
    assert done.status == 0, (seed, done.out, done.err)
    pretrain(tmp_path / "whole", *settings, processes=2).succeeded()
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole"), seed  # bit for bit
    kept = [read_progress(path).step for path in checkpoints_in(tmp_path / "killed" / "checkpoints")]
    assert kept == [third, 2 * third, 3 * third - 1, 3 * third]
    # An attempt that is killed in its first save leaves no checkpoint; most are killed later.
    assert done.out.count("resuming from") >= kills // 4, (seed, done.out)


@pytest.mark.parametrize(
    ("rank", "launcher"),
    [pytest.param(1, TORCHRUN, marks=pytest.mark.long), (0, "job.py")],  # which is torchrun's agent too
)
def test_a_rank_that_dies_is_named_and_the_job_restarts_from_its_last_checkpoint(
    rank: int, launcher: str, tmp_path: Path
) -> None:
    done = planted(f"die:{rank}:4", tmp_path, STEPS, EVERY_STEP, launcher=launcher, restarts=2).succeeded()
    assert f"(exitcode: -9) local_rank: {rank}" in done.err
    assert f"resuming from {tmp_path}/checkpoints/iter_0000003" in done.out
    assert [record["step"] for record in trace(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_job_whose_store_is_on_a_frozen_rank_is_aborted_too(tmp_path: Path) -> None:
    done = planted("freeze:0:3", tmp_path, STEPS, "train.timeout_minutes=0.2")
    assert done.status != 0
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert "train.timeout_minutes=0.2" in line
    assert "rank 0" in line


@pytest.mark.parametrize(
    ("fault", "words", "launcher"),
    [("hang", "planted.py", "job.py"), ("freeze", "not responding; last seen: ", "")],
)
def test_a_rank_that_makes_no_progress_is_named_on_rank_0_and_the_job_aborted(
    fault: str, words: str, launcher: str, tmp_path: Path
) -> None:
    timeout = "train.timeout_minutes=0.2"
    done = planted(f"{fault}:1:3", tmp_path, STEPS, EVERY_STEP, timeout, launcher=launcher, shown="0")
    assert done.status != 0
    (line,) = [line for line in done.err.splitlines() if f"error: {timeout}" in line]
    assert "train.timeout_minutes=0.2" in line
    assert "held up by rank 1" in line
    assert "rank 0" not in line
    assert words in line
    assert read_progress(checkpoints_in(tmp_path / "checkpoints")[-1]).step == 2


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any(tmp_path: Path) -> None:
    done = planted("nan:1:4", tmp_path, STEPS).succeeded()
    for rank in (0, 1):
        assert f"rank {rank} step 4: state unchanged" in done.out
    (event,) = [r for r in read_records(tmp_path / "metrics.jsonl") if r.get("event") == "skipped"]
    assert (event["step"], event["samples"]) == (4, [24, 31])
    assert "step 4 | samples 24 to 31 | skipped" in done.out
    rates = [record["lr"] for record in trace(tmp_path)]
    assert rates[4] == rates[3]  # the learning-rate schedule did not advance
    assert [record["skipped"] for record in trace(tmp_path)] == [0, 0, 0, 1, 1, 1]
    assert read_progress(checkpoints_in(tmp_path / "checkpoints")[-1]).health["skipped"] == 1


def test_a_step_and_an_evaluation_in_which_no_token_counts_are_logged_and_change_nothing(tmp_path: Path) -> None:
    settings = [STEPS, UNSAVED, "train.exit_step=3", "evaluation.interval=2", "evaluation.batches=1"]
    done = planted("masked:0:2", tmp_path, *settings).succeeded()
    assert "step 2 | samples 8 to 15 | skipped: no token counts in the loss" in done.out
    assert "step 2 | 1 of 1 held-out batches: no token counts in the loss" in done.out
    records = [record for record in trace(tmp_path) if record["step"] > 1]
    assert [record["skipped"] for record in records] == [1, 1]
    assert [record["held_out_loss"] is None for record in records] == [True, False]


@pytest.mark.parametrize("name", ["adam", pytest.param("sgd", marks=pytest.mark.long)])
def test_a_checkpoint_before_the_first_step_that_is_taken_is_loaded(name: str, tmp_path: Path) -> None:
    own = ["train.steps=3", "parallel.distributed_optimizer=false", f"optim.name={name}"]
    planted("masked:0:1", tmp_path, *own, "train.exit_step=1").succeeded()
    pretrain(tmp_path, *own, UNSAVED).succeeded()
    assert [(record["step"], record["skipped"]) for record in trace(tmp_path)] == [(1, 1), (2, 1), (3, 1)]


def test_a_step_waits_for_its_results_once(tmp_path: Path) -> None:
    done = planted("reads:0:3", tmp_path, STEPS, UNSAVED)
    assert done.status == 0, done.err
    assert "step 3 read by _step\n" in done.out


def test_steps_wait_for_no_rank_that_writes_in_the_background(tmp_path: Path) -> None:
    settings = [STEPS, "checkpoint.interval=3", "checkpoint.async_save=true"]
    done = planted("slow_writer:1:3", tmp_path, *settings).succeeded()
    assert done.out.count("ranks agree on their writers\n") == 2  # once a save
    assert [read_progress(path).step for path in checkpoints_in(tmp_path / "checkpoints")] == [3, 6]


@pytest.mark.parametrize("in_background", [False, True], ids=["saved at once", "saved in the background"])
def test_a_full_disk_is_reported_in_one_line_and_older_checkpoints_stay(in_background: bool, tmp_path: Path) -> None:
    settings = [STEPS, EVERY_STEP, f"checkpoint.async_save={str(in_background).lower()}"]
    done = planted("full_disk:0:3", tmp_path, *settings)
    assert done.status != 0
    line = error_line(done)
    for words in (f"run_dir={tmp_path}", "step 3", "No space left on device", "iter_0000002", "checkpoint.keep=N"):
        assert words in line
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert left == ["iter_0000001", "iter_0000002"]
    assert all(damage(path) is None for path in checkpoints_in(tmp_path / "checkpoints"))


def test_the_only_checkpoint_outlives_a_power_loss(tmp_path: Path) -> None:
    planted("power_loss:0:6", tmp_path, STEPS, EVERY_STEP, "checkpoint.keep=1").succeeded()
    (checkpoint,) = checkpoints_in(tmp_path / "checkpoints")
    assert [path.name for path in checkpoint.iterdir() if not path.stat().st_size] == []
    assert damage(checkpoint) is None


def test_a_run_saved_with_little_memory_resumes_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    start = f"checkpoint.resume={whole / 'checkpoints' / 'iter_0000003'}"
    for folder, more in ((whole, "checkpoint.interval=3"), (resumed, start)):
        planted("short_of_memory:1:0", folder, STEPS, more).succeeded()
    assert trace(resumed) == trace(whole)[3:]


def test_a_signal_to_one_rank_saves_and_exits_with_the_status_to_requeue(tmp_path: Path) -> None:
    done = planted("user_signal:1:3", tmp_path, STEPS, launcher="job.py", restarts=2)
    assert done.status == EXIT_REQUEUE, done.err
    assert "stopped by SIGUSR1 at step 3" in done.err
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["iter_0000003"]


def test_a_signal_to_a_run_that_saves_nothing_exits_as_stopped_not_as_finished(tmp_path: Path) -> None:
    done = planted("user_signal:1:3", tmp_path, STEPS, "checkpoint.save=false", launcher="job.py", restarts=2)
    assert done.status == 128 + signal.SIGUSR1, done.err
    assert "stopped by SIGUSR1 at step 3 | not saved: checkpoint.save=false" in done.err
    assert done.out.count("new run in") == 1


@pytest.mark.parametrize("first", [pytest.param(signal.SIGUSR1, marks=pytest.mark.long), signal.SIGINT])
def test_a_signal_to_the_launcher_and_a_second_one_still_save(first: signal.Signals, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    job = ["launch/job.py", "--standalone", "--nproc-per-node", "2", "launch/pretrain.py"]
    launcher = subprocess.Popen(
        [*PRELOADED, *job, *SMALL, f"run_dir={tmp_path}", "train.steps=100000", "data.num_workers=1"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert launcher.stdout is not None
    assert any(" 3/100000 |" in line for line in launcher.stdout)
    os.killpg(launcher.pid, first)  # as a terminal does
    time.sleep(0.2)
    launcher.send_signal(signal.SIGTERM)
    launcher.stdout.read()
    assert launcher.wait(timeout=600) == EXIT_REQUEUE
    (saved,) = checkpoints_in(tmp_path / "checkpoints")
    assert damage(saved) is None
    assert read_progress(saved).step >= 3
