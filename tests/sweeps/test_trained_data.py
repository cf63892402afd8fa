"""A finished run is known again where it was moved, and rejected with other data."""

import json
import shutil
from pathlib import Path

import pytest

from s2train.checkpoints.data_order import data_order
from s2train.checkpoints.folders import Progress, write_config
from s2train.checkpoints.held_out import held_out_contents
from s2train.checkpoints.listing import checkpoint_at
from s2train.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from s2train.data.tokenizers import fingerprint
from s2train.sweeps.jobs import changed_setting

FILES = [("train.bin", "data.path"), ("held-out.bin", "data.valid_path"), ("tokenizer.json", "data.tokenizer")]


def settings(root: Path) -> PretrainConfig:
    """Settings of a run with its data in `root`."""
    data = DataConfig(
        path=str(root / "data" / "train"),
        valid_path=str(root / "data" / "held-out"),
        tokenizer=str(root / "data" / "tokenizer.json"),
        cache=str(root / "data" / "cache"),
    )
    return PretrainConfig(
        model=ModelConfig(name="m"), train=TrainConfig(steps=1), data=data, run_dir=str(root / "runs" / "a")
    )


@pytest.fixture
def moved(tmp_path: Path) -> PretrainConfig:
    """Settings of a run that was trained in another root."""
    trained = settings(tmp_path / "before")
    (tmp_path / "before" / "data").mkdir(parents=True)
    for name in ("train.idx", "train.bin", "held-out.idx", "held-out.bin", "tokenizer.json"):
        (tmp_path / "before" / "data" / name).write_text(f"content of {name}")
    checkpoint = checkpoint_at(trained.run_dir, 1)
    checkpoint.mkdir(parents=True)
    data = {"tokenizer": fingerprint(trained.data.tokenizer), "held_out": held_out_contents(trained)}
    progress = Progress(1, 1, data_order(trained), None, **data)
    progress.write(checkpoint / "progress.json")
    write_config(trained, Path(trained.run_dir) / "config.yaml")
    shutil.move(tmp_path / "before", tmp_path / "now")
    return settings(tmp_path / "now")


def test_data_that_were_moved_with_a_run_are_no_changed_setting(moved: PretrainConfig) -> None:
    assert changed_setting(Path(moved.run_dir), moved) is None


@pytest.mark.parametrize(("name", "setting"), FILES)
def test_other_data_in_their_place_are_a_changed_setting(name: str, setting: str, moved: PretrainConfig) -> None:
    Path(moved.data.path).with_name(name).write_text("another")
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith(f"{setting}=")


def test_held_out_data_of_another_place_are_a_changed_setting(moved: PretrainConfig) -> None:
    moved.data.valid_path = str(Path(moved.data.path).with_name("another"))
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith("data.valid_path=")


@pytest.mark.parametrize(("name", "setting"), FILES)
def test_data_that_were_replaced_are_a_changed_setting(name: str, setting: str, moved: PretrainConfig) -> None:
    write_config(moved, Path(moved.run_dir) / "config.yaml")  # as if it had been trained here
    assert changed_setting(Path(moved.run_dir), moved) is None
    Path(moved.data.path).with_name(name).write_text("another")
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith(f"other content of {setting}=")


def test_data_that_are_gone_are_no_changed_setting(moved: PretrainConfig) -> None:
    write_config(moved, Path(moved.run_dir) / "config.yaml")
    shutil.rmtree(Path(moved.data.path).parent)
    assert changed_setting(Path(moved.run_dir), moved) is None


def test_held_out_data_that_a_checkpoint_does_not_record_may_be_any(moved: PretrainConfig) -> None:
    path = checkpoint_at(moved.run_dir, 1) / "progress.json"
    path.write_text(
        json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "held_out"})
    )
    Path(moved.data.valid_path).with_suffix(".bin").write_text("another")
    assert changed_setting(Path(moved.run_dir), moved) is None
