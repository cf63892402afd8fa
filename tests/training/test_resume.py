"""Stopping and resuming; what may be resumed, and what is left alone."""

import json
from pathlib import Path

import pytest
from megatron.core import dist_checkpointing

from s2train.megatron.checkpoint import read_config, read_progress
from s2train.training.plots import read_curves
from tests.program import Outcome, error_line, metrics, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

STEPS = "train.steps=6"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, stopped at step 3 of 6, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("stopped")
    done = pretrain(folder, STEPS, "train.exit_step=3", "checkpoint.interval=1", "checkpoint.keep=2", processes=2)
    assert done.status == 0, done.err
    return folder


def refused(outcome: Outcome, *words: str) -> None:
    assert outcome.status != 0
    line = error_line(outcome)
    assert all(word in line for word in words), line


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_only_the_last_checkpoints_are_kept(stopped: Path) -> None:
    assert [path.name for path in sorted((stopped / "checkpoints").glob("iter_*"))] == ["iter_0000002", "iter_0000003"]


def test_stop_and_resume_equals_an_unbroken_run(stopped: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "unbroken", STEPS, processes=2).status == 0
    resumed = pretrain(tmp_path / "resumed", STEPS, f"checkpoint.resume={stopped}", processes=2)
    assert resumed.status == 0, resumed.err
    expected = [(r["loss"], r["grad_norm"], r["lr"]) for r in metrics(tmp_path / "unbroken")]
    found = [(r["loss"], r["grad_norm"], r["lr"]) for r in metrics(tmp_path / "resumed")]
    assert found == expected[3:]  # bit for bit


def test_a_finished_run_started_again_does_nothing(stopped: Path) -> None:
    before = files(stopped)
    done = pretrain(stopped, STEPS, "train.exit_step=3", "optim.lr=0.1")
    assert done.status == 0, done.err
    assert "nothing to do" in done.out
    assert files(stopped) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["layout.pattern.stride=2"], ["layout.pattern.stride=2", "layout.pattern.stride=4"]),
        (["model.ffn_hidden_size=128"], ["model.ffn_hidden_size=128", "=96"]),
        (["parallel.distributed_optimizer=false"], ["parallel.distributed_optimizer=true"]),
        (["checkpoint.resume=never"], ["checkpoint.resume=never", "auto"]),
        (["checkpoint.resume={stopped}/checkpoints/iter_0000002"], ["iter_0000003", "run_dir"]),
        (["train.steps=9"], ["data.num_samples=72", "48"]),
        (["seed=7"], ["seed=7", "1234"]),
        (["train.seq_length=64"], ["train.seq_length=64", "128"]),
        (["run_dir={stopped}_new", "checkpoint.resume={stopped}", "train.exit_step=3"], ["train.steps=3", "step 3"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_what_does_not_fit_the_checkpoint_is_refused_and_nothing_overwritten(
    stopped: Path, change: list[str], words: list[str]
) -> None:
    before = files(stopped)
    refused(pretrain(stopped, STEPS, *(setting.format(stopped=stopped) for setting in change), processes=0), *words)
    assert files(stopped) == before


def test_a_new_phase_takes_other_data_from_their_beginning(stopped: Path, tmp_path: Path) -> None:
    changes = ["train.seq_length=64", "checkpoint.new_data=true", "train.exit_step=4"]
    done = pretrain(tmp_path, STEPS, f"checkpoint.resume={stopped}", *changes, processes=0)
    assert done.status == 0, done.err
    progress = read_progress(tmp_path / "checkpoints" / "iter_0000004")
    assert (progress.step, progress.consumed_samples) == (4, 8)
    again = pretrain(
        tmp_path, STEPS, f"checkpoint.resume={stopped}", *changes[:2], "checkpoint.resume=auto", processes=0
    )
    assert again.status == 0, again.err
    assert read_progress(tmp_path / "checkpoints" / "iter_0000006").consumed_samples == 24


def test_a_save_that_was_killed_is_no_checkpoint(stopped: Path, tmp_path: Path) -> None:
    (stopped / "checkpoints" / ".iter_0000009.partial").mkdir()
    (stopped / "checkpoints" / "latest_checkpointed_iteration.txt").unlink()
    done = pretrain(tmp_path, STEPS, "train.exit_step=4", f"checkpoint.resume={stopped}", processes=0)
    assert done.status == 0, done.err
    assert "iter_0000003" in done.out
    assert sorted(read_curves(tmp_path / "metrics.jsonl").train) == [4]


def test_a_damaged_checkpoint_is_told_in_one_line(stopped: Path, tmp_path: Path) -> None:
    shard = next((stopped / "checkpoints" / "iter_0000002").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    resume = f"checkpoint.resume={stopped}/checkpoints/iter_0000002"
    refused(pretrain(tmp_path, STEPS, resume, processes=0), "iter_0000002", "shards")


def test_changed_hyperparameters_hold_after_a_resume(stopped: Path, tmp_path: Path) -> None:
    changes = ["optim.lr=5e-4", "optim.min_lr=5e-4", "optim.beta2=0.5", "train.exit_step=4"]
    done = pretrain(tmp_path, STEPS, f"checkpoint.resume={stopped}", *changes, processes=0)
    assert done.status == 0, done.err
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(5e-4)
    checkpoint = tmp_path / "checkpoints" / "iter_0000004"
    assert read_config(checkpoint).optim.lr == 5e-4
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]["optimizer"]["param_groups"]
    assert all(tuple(group["betas"]) == (0.9, 0.5) for group in saved)


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    changes = ["optim.lr=1e20", "checkpoint.interval=1", "checkpoint.keep=1"]
    refused(pretrain(tmp_path, STEPS, *changes, processes=0), "Not saved")
    saved = [path.name for path in (tmp_path / "checkpoints").glob("iter_*")]
    losses = [json.loads(line).get("loss", 0.0) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(saved) == 1
    assert None not in losses


def test_a_run_folder_is_one_jobs_alone(stopped: Path) -> None:
    from filelock import FileLock

    with FileLock(stopped / ".lock"):
        refused(pretrain(stopped, STEPS, processes=0), "run_dir=", "another job")
