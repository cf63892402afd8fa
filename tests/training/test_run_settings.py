"""A run folder keeps earlier settings and metrics, and the run logs changes."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from s2train.checkpoints.folders import Progress, read_config
from s2train.checkpoints.held_out import HeldOutChange
from s2train.checkpoints.resume import Start
from s2train.checkpoints.setting_changes import Change
from s2train.training.metrics import StepMetrics, Tracker
from s2train.training.run_report import report_start
from s2train.training.run_settings import write_settings
from tests.test_configs import pretrain

LR = [Change("optim.lr", 0.003, 0.001)]


def test_earlier_settings_are_kept_and_changes_listed(tmp_path: Path) -> None:
    first, second = (pretrain("+model=tiny_hybrid", f"optim.lr={lr}") for lr in (0.003, 0.001))
    assert write_settings(first, tmp_path, 0, []) is None
    assert write_settings(second, tmp_path, 40, LR) == tmp_path / "config.1.yaml"
    assert write_settings(first, tmp_path, 60, [Change("optim.lr", 0.001, 0.003)]) == tmp_path / "config.2.yaml"
    lr = [OmegaConf.load(tmp_path / name).optim.lr for name in ("config.1.yaml", "config.2.yaml", "config.yaml")]
    assert lr == [0.003, 0.001, 0.003]
    assert (tmp_path / "config.yaml").read_text().splitlines()[:2] == [
        "# from step 41 on: optim.lr 0.003 → 0.001; before: config.1.yaml",
        "# from step 61 on: optim.lr 0.001 → 0.003; before: config.2.yaml",
    ]
    assert read_config(tmp_path) == first


def test_the_same_settings_do_not_rewrite_the_file(tmp_path: Path) -> None:
    cfg = pretrain("+model=tiny_hybrid")
    write_settings(cfg, tmp_path, 0, [])
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    assert write_settings(cfg, tmp_path, 40, []) is None
    assert (tmp_path / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize("text", ["", "model: {name: sma", "optim:\n  lr: 1"])
def test_a_truncated_settings_file_is_kept_too(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    kept = write_settings(pretrain("+model=tiny_hybrid"), tmp_path, 0, [])
    assert kept is not None
    assert kept.read_text() == text
    assert (tmp_path / "config.yaml").read_text().startswith("# from step 1 on: a new run; before: config.1.yaml\n")


def track(folder: Path, step: int, *changes: Change) -> list[dict[str, object]]:
    cfg = pretrain("+model=tiny_hybrid", f"run_dir={folder}", "tracking.wandb=disabled")
    tracker = Tracker(cfg, Progress(step, 0, {}, None), active=True)
    tracker.changes(step, folder / "checkpoints" / "iter_0000040", changes)
    tracker.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_changed_settings_are_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (event,) = [record for record in track(tmp_path, 40, *LR) if record.get("event") == "changed settings"]
    assert (event["step"], event["settings"]) == (40, {"optim.lr": [0.003, 0.001]})
    assert capsys.readouterr().out == "changed since iter_0000040: optim.lr 0.003 → 0.001\n"


def test_other_held_out_data_are_logged_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = pretrain("+model=tiny_hybrid", "data=mock", f"run_dir={tmp_path}", "tracking.wandb=disabled")
    change = HeldOutChange(40, ("a", ["1 bytes"]), ("b", ["2 bytes"]))
    start = Start(tmp_path / "iter_0000040", Progress(40, 0, {}, None), held_out=change)
    tracker = Tracker(cfg, start.progress, active=True)
    report_start(cfg, start, "a run", 0, tracker)
    tracker.close()
    assert f"\n{change}\n" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [event] = [record for record in records if record.get("event") == "other held-out data"]
    assert (event["step"], event["before"], event["now"]) == (40, ["a", ["1 bytes"]], ["b", ["2 bytes"]])


def test_a_start_from_step_1_in_an_earlier_runs_folder_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 52, "loss": 3.0}\n{"step": 5')
    (event,) = [record for record in track(tmp_path, 0) if record.get("event") == "earlier run"]
    assert (event["metrics"], event["last_step"]) == ("metrics.1.jsonl", 52)
    out = capsys.readouterr().out
    assert "starting from step 1" in out
    assert "to step 52, are kept as metrics.1.jsonl" in out


def test_a_first_start_logs_no_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    track(tmp_path, 0)
    assert capsys.readouterr().out == ""


def test_the_eta_names_its_step_if_that_is_not_the_last() -> None:
    values = {field.name: 1.0 for field in fields(StepMetrics) if field.default is field.default_factory is MISSING}
    metrics = StepMetrics(**values | {"step": 190, "held_out_loss": None, "mfu": None, "eta_s": 5.0})
    assert metrics.line(400, last_step=200).endswith("| ETA 0:00:05 to step 200")
    assert metrics.line(400, last_step=400).endswith("| ETA 0:00:05")
