"""Results are printed in lines, and logged by file and task."""

from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.folders import Progress
from s2train.config import ModelConfig, PretrainConfig, TrainConfig
from s2train.evaluation.report import figures, log_figures, report
from tests.test_wandb_run import fake

TEXT = {
    "file": "a/held-out.jsonl", "documents": 2, "tokens": 1000, "loss": 1.5, "perplexity": 4.48, "bits_per_byte": 2.1,
    "accuracy": 0.4, "short": 2.0, "long": None, "by_position": [[0, 8, 2.0], [8, 16, None]],
}  # fmt: skip
TASKS = {"results": {"own": {"alias": "own", "acc,none": 0.25, "acc_stderr,none": "N/A", "sample_len": 4}}}


def content(*texts: dict[str, Any], tasks: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"texts": list(texts), "tasks": tasks or {}, "length": 16, "windows": "whole"}


def test_a_text_has_a_line_and_one_for_each_range_of_positions() -> None:
    assert report(content(TEXT)).splitlines() == [
        "a/held-out.jsonl: loss 1.5000, perplexity 4.480, accuracy 0.4000, 2.1000 bits per byte"
        " (1,000 tokens of 2 documents, whole windows of 16)",
        "  positions       0 to       8: loss 2.0000",
        "  positions       8 to      16: loss none",
    ]


def test_one_document_is_named_in_the_singular() -> None:
    assert "(1,000 tokens of 1 document, whole" in report(content(TEXT | {"documents": 1}))


def test_a_task_has_a_line_for_each_number() -> None:
    assert report(content(tasks=TASKS)) == "own: acc 0.2500"


def test_figures_are_named_by_file_and_task() -> None:
    found = figures(content(TEXT, tasks=TASKS))
    assert found["evaluation/held-out/loss"] == 1.5
    assert found["evaluation/own/acc"] == 0.25
    assert "evaluation/held-out/long" not in found


def test_files_of_one_name_are_named_by_their_paths() -> None:
    found = figures(content(TEXT, TEXT | {"file": "b/held-out.jsonl", "loss": 2.5}))
    assert found["evaluation/a/held-out.jsonl/loss"] == 1.5
    assert found["evaluation/b/held-out.jsonl/loss"] == 2.5


def test_figures_are_logged_to_the_training_s_run_at_its_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wandb = fake(monkeypatch)
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000007"
    checkpoint.mkdir(parents=True)
    Progress(7, 56, {}, "run5").write(checkpoint / "progress.json")
    trained = PretrainConfig(
        model=ModelConfig(name="m"), train=TrainConfig(seq_length=128), run_dir=str(tmp_path / "run")
    )
    assert log_figures(content(TEXT, tasks=TASKS), checkpoint, trained, "offline") == "run5"
    assert wandb.finished
    (settings,), (row,) = wandb.inits, wandb.rows
    assert settings["id"] == "run5"
    assert row == {**figures(content(TEXT, tasks=TASKS)), "step": 7, "data/consumed_tokens": 56 * 128}
