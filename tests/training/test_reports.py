"""A run prints and records what happened, besides its checkpoints."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from s2train.checkpoints.folders import read_progress
from s2train.training.records import read_records
from tests.program import UNSAVED, Outcome, metrics, pretrain

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


@pytest.fixture(scope="module")
def outcome(folder: Path) -> Outcome:
    settings = ["train.steps=4", "evaluation.interval=2", "evaluation.batches=1", "tracking.timing=2"]
    return pretrain(
        folder, *settings, "optim.min_lr_ratio=1", "tracking.wandb=offline", processes=0, pictures=True
    ).succeeded()


def test_every_report_is_one_line_and_one_record(outcome: Outcome, folder: Path) -> None:
    records = metrics(folder)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [("held_out_loss" in record) for record in records] == [False, True, False, True]
    for record in records:
        assert {"loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "model_tflops", "eta_s"} <= set(record)
    assert [record["consumed_tokens"] for record in records] == [1024, 2048, 3072, 4096]
    # anywhere in a line: other threads and wandb's process may print before it
    lines = re.findall(r"step \d/4 \| .*", outcome.out)
    assert len(lines) == 4, outcome.out
    assert "held out" in lines[1]


def test_every_line_has_a_time(outcome: Outcome, folder: Path) -> None:
    times = [datetime.fromisoformat(record["time"]) for record in read_records(folder / "metrics.jsonl")]
    assert times == sorted(times)
    assert abs(datetime.now(UTC) - times[-1]) < timedelta(minutes=10)


def test_the_learning_rate_decays_to_its_ratio_and_not_below(outcome: Outcome, folder: Path) -> None:
    assert [record["lr"] for record in metrics(folder)] == [0, 0.0015, 0.003, 0.003]


def test_a_run_logs_where_the_time_before_its_first_step_went(outcome: Outcome, folder: Path) -> None:
    lines = outcome.out.splitlines()
    (ready,) = [line for line in lines if line.startswith("ready after ")]
    (first,) = [line for line in lines if line.startswith("step 1 done after ")]
    events = {record["event"]: record for record in read_records(folder / "metrics.jsonl") if "event" in record}
    before, until = events["ready"]["seconds"], events["first step"]["seconds"]
    parts = ["shell and python", "imports", "compose", "plan", "device", "megatron", "libraries", "checks"]
    parts += ["process groups", "kernels", "model", "data", "records"]
    assert list(before) == parts
    assert list(until) == [*parts, "first step"]
    assert all(seconds >= 0 for seconds in until.values())
    assert ready.startswith(f"ready after {sum(before.values()):.1f} s (shell and python ")
    assert first.startswith(f"step 1 done after {sum(until.values()):.1f} s (shell and python ")


def test_a_run_logs_how_many_epochs_of_its_data_it_takes(outcome: Outcome, folder: Path) -> None:
    (event,) = [record for record in read_records(folder / "metrics.jsonl") if record.get("event") == "data"]
    ((prefix, epochs),) = event["epochs"].items()
    assert f"{prefix}: {epochs:.3g} epochs of " in outcome.out


def test_throughput_is_computed_from_the_step_time(outcome: Outcome, folder: Path) -> None:
    for record in metrics(folder):
        assert record["tokens_per_s"] == pytest.approx(8 * 128 / record["step_time_s"])
        assert record["model_tflops"] > 0


def test_megatrons_timers_are_printed_on_request(outcome: Outcome, folder: Path) -> None:
    assert "forward-backward" in outcome.out


def test_pictures_and_settings_are_in_the_run_folder(outcome: Outcome, folder: Path) -> None:
    assert all((folder / name).stat().st_size > 1000 for name in ("loss.png", "layout.png", "config.yaml"))


def test_the_layouts_picture_is_drawn_after_the_first_step(outcome: Outcome, folder: Path) -> None:
    (first,) = [e for e in read_records(folder / "metrics.jsonl") if e.get("event") == "first step"]
    drawn = datetime.fromtimestamp((folder / "layout.png").stat().st_mtime, UTC)
    assert drawn > datetime.fromisoformat(first["time"])


def test_the_checkpoint_records_the_wandb_run(outcome: Outcome, folder: Path) -> None:
    identifier = read_progress(folder / "checkpoints" / "iter_0000004").wandb_id
    assert identifier is not None
    assert list((folder / "wandb").glob(f"offline-run-*-{identifier}"))


def assert_kernels_are_logged(outcome: Outcome, why: str) -> None:
    lines = [line for line in outcome.out.splitlines() if line.startswith("sparse attention:")]
    assert lines == [f"sparse attention: forward torch ({why}), backward torch ({why})"]
    assert " | layers local on cpu | sparse attention torch | " in outcome.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what a CPU runs")
def test_the_first_step_logs_which_kernels_ran_and_why(outcome: Outcome, tmp_path: Path) -> None:
    assert_kernels_are_logged(outcome, "no CUDA device")
    chosen = pretrain(tmp_path, "train.steps=3", UNSAVED, "attention_backend=torch").succeeded()
    assert_kernels_are_logged(chosen, "backend=torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what a CPU runs")
def test_a_dense_model_logs_no_kernels(tmp_path: Path) -> None:
    done = pretrain(tmp_path, "train.steps=3", UNSAVED, "layout.layers=D").succeeded()
    assert "sparse attention" not in done.out
    assert " | layers local on cpu | " in done.out


@pytest.mark.parametrize("stages", ["parallel.vpp=null", "parallel.vpp=2"])
def test_timers_of_pipeline_ranks_are_reported_by_their_names(stages: str, tmp_path: Path) -> None:
    settings = ["train.steps=1", "optim.warmup_steps=0", UNSAVED, "tracking.timing=2", "parallel.pp=2", stages]
    done = pretrain(tmp_path, *settings, processes=2).succeeded()
    timed = dict(re.findall(r"^ +([a-z-]+) \.*: \((.*)\)$", done.out, re.MULTILINE))
    # The second rank alone receives before its first forward pass, the first alone before its first backward pass.
    for name in ("forward-recv", "backward-recv"):
        least, most = timed[name].split(", ")
        assert least == most
    assert timed["forward-compute"]
