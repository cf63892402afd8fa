"""Stopping and resuming; what may be resumed, and what is left alone."""

from pathlib import Path

import pytest

from s2train.training.plots import read_curves
from tests.program import Outcome, metrics, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]

STEPS = "train.steps=6"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, stopped at step 3 of 6, with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("stopped")
    done = pretrain(folder, STEPS, "train.exit_step=3", "checkpoint.interval=1", processes=2)
    assert done.status == 0, done.err
    return folder


def refused(outcome: Outcome, *words: str) -> None:
    """One line on stderr that names what is wrong, and a status that is not 0."""
    assert outcome.status != 0
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line


def test_stop_and_resume_equals_an_unbroken_run(stopped: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "unbroken", STEPS, processes=2).status == 0
    resumed = pretrain(tmp_path / "resumed", STEPS, f"checkpoint.resume={stopped}", processes=2)
    assert resumed.status == 0, resumed.err
    expected = [(r["loss"], r["grad_norm"], r["lr"]) for r in metrics(tmp_path / "unbroken")]
    found = [(r["loss"], r["grad_norm"], r["lr"]) for r in metrics(tmp_path / "resumed")]
    assert found == expected[3:]  # bit for bit


def test_a_finished_run_started_again_does_nothing(stopped: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("iter_*/**/*")}
    done = pretrain(stopped, STEPS, "train.exit_step=3")
    assert done.status == 0, done.err
    assert "stopped at step 3" in done.out
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("iter_*/**/*")} == before


def test_another_architecture_is_refused_and_nothing_overwritten(stopped: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    refused(pretrain(stopped, STEPS, "layout.pattern.stride=2"), "layout.pattern.stride=2", "layout.pattern.stride=4")
    refused(pretrain(stopped, STEPS, "model.ffn_hidden_size=128"), "model.ffn_hidden_size=128", "=96")
    assert {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()} == before


def test_a_used_run_folder_is_not_started_afresh(stopped: Path) -> None:
    refused(pretrain(stopped, STEPS, "checkpoint.resume=never"), "checkpoint.resume=never", "auto")


def test_another_order_of_the_data_is_refused(stopped: Path) -> None:
    refused(pretrain(stopped, "train.steps=9"), "data.num_samples", "48")


def test_the_last_whole_checkpoint_is_taken(stopped: Path, tmp_path: Path) -> None:
    """A half-written checkpoint has another name, and the one named latest is whole."""
    (stopped / "checkpoints" / ".iter_0000009.partial").mkdir()
    done = pretrain(tmp_path, STEPS, "train.exit_step=4", f"checkpoint.resume={stopped}")
    assert done.status == 0, done.err
    assert "iter_0000003" in done.out
    assert sorted(read_curves(tmp_path / "metrics.jsonl").train) == [4]
