"""A report becomes a line of metrics.jsonl and a row in wandb."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from s2train.checkpoints.folders import Progress
from s2train.config import ModelConfig, PretrainConfig, TrackingConfig, TrainConfig
from s2train.training.metrics import StepMetrics, Tracker
from tests.test_wandb_run import fake


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        consumed_tokens=step * 1024,
        loss=2.0,
        held_out_loss=2.5,
        lr=1e-3,
        grad_norm=1.0,
        step_time_s=0.5,
        tokens_per_s=2048.0,
        model_tflops=1.0,
        mfu=0.5,
        memory_gib=1.0,
        eta_s=10.0,
        held_out_loss_by_position=[(0, 64, 3.0), (64, 128, 2.0)],
        held_out_short=3.0,
        held_out_long=2.0,
    )


def settings(folder: Path, wandb: str) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(name="m"),
        train=TrainConfig(steps=4, seq_length=128, global_batch_size=8),
        tracking=TrackingConfig(wandb=wandb),
        run_dir=str(folder),
    )


def test_wandb_groups_the_values_of_a_report_by_section() -> None:
    row = metrics(4).wandb_row()
    assert (row["step"], row["data/consumed_tokens"]) == (4, 4096)
    assert (row["train/loss"], row["validation/loss"], row["perf/mfu"]) == (2.0, 2.5, 0.5)
    assert (row["validation/loss_at/0"], row["validation/loss_at/64"]) == (3.0, 2.0)
    sections = {key.partition("/")[0] for key in row}
    assert sections == {"step", "data", "train", "validation", "perf"}
    # every field: the loss by position under two keys, and neither a column of a kind of attention nor `timed_from`
    assert len(row) == len(fields(StepMetrics)) - 3 + 2


def test_rows_and_pictures_are_logged_at_the_same_step_and_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wandb = fake(monkeypatch)
    tracker = Tracker(settings(tmp_path, wandb="offline"), Progress(2, 16, {}, None), active=True)
    tracker.picture("layout/picture", tmp_path / "layout.png")
    tracker.report(metrics(4))
    tracker.picture("train/loss_curve", tmp_path / "loss.png")
    tracker.close()
    assert [(row["step"], row["data/consumed_tokens"]) for row in wandb.rows] == [(2, 2048), (4, 4096), (4, 4096)]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("time" in record for record in records)
    assert [record["held_out_loss"] for record in records if "loss" in record] == [2.5]


def test_numbers_that_are_not_finite_are_null_also_those_of_layers(tmp_path: Path) -> None:
    tracker = Tracker(settings(tmp_path, wandb="disabled"), Progress(2, 16, {}, None), active=True)
    tracker.report(replace(metrics(4), loss=math.nan, auxiliary={"toy_kl/1": 0.5, "toy_kl/3": math.inf}))
    tracker.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert (record["loss"], record["toy_kl"], record["toy_kl_by_layer"]) == (None, None, {"1": 0.5, "3": None})
