"""A finished run is known again where it was moved, and rejected with other data."""

import shutil
from pathlib import Path

import pytest

from s2train.checkpoints.data_order import data_order
from s2train.checkpoints.folders import Progress, write_config
from s2train.checkpoints.listing import checkpoint_at
from s2train.config import DataConfig, ModelConfig, PretrainConfig, TrainConfig
from s2train.data.tokenizers import fingerprint
from s2train.sweeps.jobs import changed_setting


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
    for name in ("train.idx", "train.bin", "tokenizer.json"):
        (tmp_path / "before" / "data" / name).write_text(f"content of {name}")
    checkpoint = checkpoint_at(trained.run_dir, 1)
    checkpoint.mkdir(parents=True)
    progress = Progress(1, 1, data_order(trained), None, tokenizer=fingerprint(trained.data.tokenizer))
    progress.write(checkpoint / "progress.json")
    write_config(trained, Path(trained.run_dir) / "config.yaml")
    shutil.move(tmp_path / "before", tmp_path / "now")
    return settings(tmp_path / "now")


def test_data_that_were_moved_with_a_run_are_no_changed_setting(moved: PretrainConfig) -> None:
    assert changed_setting(Path(moved.run_dir), moved) is None


@pytest.mark.parametrize(("name", "setting"), [("train.bin", "data.path"), ("tokenizer.json", "data.tokenizer")])
def test_other_data_in_their_place_are_a_changed_setting(name: str, setting: str, moved: PretrainConfig) -> None:
    Path(moved.data.path).with_name(name).write_text("another")
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith(f"{setting}=")


def test_held_out_data_of_another_place_are_a_changed_setting(moved: PretrainConfig) -> None:
    moved.data.valid_path = str(Path(moved.data.path).with_name("another"))
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith("data.valid_path=")


@pytest.mark.parametrize(("name", "setting"), [("train.bin", "data.path"), ("tokenizer.json", "data.tokenizer")])
def test_data_that_were_replaced_are_a_changed_setting(name: str, setting: str, moved: PretrainConfig) -> None:
    write_config(moved, Path(moved.run_dir) / "config.yaml")  # as if it had been trained here
    assert changed_setting(Path(moved.run_dir), moved) is None
    Path(moved.data.path).with_name(name).write_text("another")
    assert str(changed_setting(Path(moved.run_dir), moved)).startswith(f"other content of {setting}=")


def test_data_that_are_gone_are_no_changed_setting(moved: PretrainConfig) -> None:
    write_config(moved, Path(moved.run_dir) / "config.yaml")
    shutil.rmtree(Path(moved.data.path).parent)
    assert changed_setting(Path(moved.run_dir), moved) is None
