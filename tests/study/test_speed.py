import json
from pathlib import Path
from typing import Any

import pytest

from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.study import speed
from s2train.study.files import Folders
from s2train.study.plan import plan_table
from s2train.study.settings import Recipe, train_settings
from s2train.study.variants import Run

RECIPE = Recipe(1e-3, 1 << 17)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, Path("launch"))


def take_steps(folders: Folders, run: Run, gpus: int) -> None:
    """Write what a run's first steps leave behind."""
    folder = folders.root / "speed" / speed.key(run, gpus)
    folder.mkdir(parents=True)
    report = {"loss": 3.0, "step_time_s": 0.5, "tokens_per_s": 500_000, "model_tflops": 1.0, "memory_gib": 40.0}
    (folder / "metrics.jsonl").write_text(json.dumps(report | {"step": 30, "consumed_tokens": 7}) + "\n")


@pytest.mark.parametrize("run", [Run("hybrid"), Run("window", "32k"), Run("window", "64k")], ids=lambda run: run.name)
def test_first_steps_have_the_runs_shape_and_save_nothing(run: Run, folders: Folders) -> None:
    cfg, whole = (
        compose_run(settings)
        for settings in (speed.speed_settings(folders, run, RECIPE, 2), train_settings(folders, run, RECIPE, 2))
    )
    for name in ("seq_length", "global_batch_size", "micro_batch_size"):
        assert getattr(cfg.train, name) == getattr(whole.train, name)
    assert (cfg.layout, cfg.model, cfg.data) == (whole.layout, whole.model, whole.data)
    assert (cfg.train.steps, cfg.evaluation.interval, cfg.checkpoint.save) == (speed.STEPS, 0, False)
    assert cfg.checkpoint.resume == "auto"
    assert cfg.run_dir != whole.run_dir


def test_first_steps_are_those_after_a_scorers_warm_up(folders: Folders) -> None:
    for run in (Run("index", "16k-40m"), Run("index", "16k-40m-from-dense")):
        cfg = compose_run(speed.speed_settings(folders, run, RECIPE, 1))
        assert cfg.layout.kinds["E"]["warm_up_steps"] == cfg.train.freeze_trunk_steps == 0


def test_the_plan_shows_measured_seconds_beside_predicted_ones(folders: Folders) -> None:
    run = Run("hybrid", seed=2)
    take_steps(folders, run, 2)
    speed.record(folders, run, 2)
    assert speed.read(folders).keys() == {"hybrid-16k-gpus2"}
    columns = plan_table(folders, RECIPE, 2, "h100-80gb", [Run("hybrid"), Run("dense")]).columns
    assert [list(columns[index].cells) for index in (5, 7)] == [["600", "", ""], ["40.0", "", ""]]


def test_measurements_keep_the_environment_they_were_made_in(folders: Folders) -> None:
    folders.results.mkdir(parents=True)
    earlier = {"device": "NVIDIA H100", "date": "2026-11-22"}
    row = {"gpus": 1, "tokens_per_s": 5e5, "peak_memory_gib": 9.5, "mfu": None}
    folders.speed.write_text(json.dumps({"rows": {"dense-16k-gpus1": row}, "environment": earlier}))
    take_steps(folders, Run("hybrid"), 1)
    speed.record(folders, Run("hybrid"), 1)
    rows = speed.read(folders)
    assert rows["dense-16k-gpus1"]["environment"] == earlier
    assert rows["hybrid-16k-gpus1"]["environment"]["torch"] == environment()["torch"]


@pytest.mark.parametrize(
    "change", [{"gpus": 0}, {"tokens_per_s": "5e5"}, {"tokens_per_s": 0.0}, {"peak_memory_gib": None}]
)
def test_a_measurement_with_a_value_that_is_none_is_named(folders: Folders, change: dict[str, Any]) -> None:
    row = {"gpus": 1, "tokens_per_s": 5e5, "peak_memory_gib": 9.5, "mfu": None}
    folders.results.mkdir(parents=True)
    folders.speed.write_text(json.dumps({"rows": {"dense-16k-gpus1": row | change}}))
    with pytest.raises(ConfigError, match=r"speed\.json: is no result of this study"):
        speed.read(folders)


def test_the_plan_leaves_out_seconds_of_runs_without_a_prediction(folders: Folders) -> None:
    runs = [Run("hybrid"), Run("moba", "16k-40m")]
    columns = plan_table(folders, RECIPE, 1, "h100-80gb", runs).columns
    seconds = list(columns[4].cells)
    assert (seconds[0], seconds[1]) == (seconds[2], "")
    assert list(columns[0].cells)[-1] == "1 of 2 runs"
