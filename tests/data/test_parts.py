import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from s2train.checkpoints.data_order import data_order
from s2train.config import PretrainConfig
from s2train.data.checks import check_data
from s2train.data.datasets import build_datasets
from s2train.data.epochs import training_epochs
from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from tests.data_fixtures import write_dataset

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def letters(tmp_path: Path) -> dict[str, str]:
    """Prefixes of two datasets, one of letters a, one of letters b."""
    lengths = {"a": 40_000, "b": 4_000}
    return {letter: write_dataset(tmp_path / letter, letter * length) for letter, length in lengths.items()}


@pytest.fixture
def run(letters: dict[str, str], config: MakeConfig) -> PretrainConfig:
    """Trains on letters a and evaluates on letters b."""
    cfg = config(letters["a"])
    cfg.data.valid_path, cfg.data.split = letters["b"], PretrainConfig().data.split
    return cfg


def distinct(dataset: Any) -> set[str]:
    return {chr(token) for n in range(len(dataset)) for token in dataset[n]["tokens"].tolist() if token < 256}


def test_a_run_trains_on_all_of_path_and_evaluates_on_valid_path(run: PretrainConfig) -> None:
    check_data(run, ByteTokenizer())
    train, held_out = build_datasets(run, ByteTokenizer(), 600, 20)
    assert (distinct(train), distinct(held_out)) == ({"a"}, {"b"})
    assert training_epochs(run.data, 600, 64)[0].tokens == 40_001


def test_what_a_run_evaluates_on_does_not_change_what_it_trains_on(
    run: PretrainConfig, letters: dict[str, str]
) -> None:
    before = data_order(run)
    run.data.valid_path = [letters["b"], letters["b"]]
    assert data_order(run) == before


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"valid_path": "nowhere"}, "data.valid_path"),
        ({"valid_path": "bundled"}, "data.valid_path"),
        ({"valid_path": 3}, "data.valid_path"),
        ({"split": "95,5"}, "data.split"),
    ],
)
def test_bad_settings_are_named(run: PretrainConfig, changes: dict[str, Any], setting: str) -> None:
    for name, value in changes.items():
        setattr(run.data, name, value)
    with pytest.raises(ConfigError) as caught:
        check_data(run, ByteTokenizer())
    assert caught.value.setting == setting


@pytest.mark.parametrize("spelling", ["{}", "{}/../a", "link"])
def test_evaluating_on_training_data_is_rejected(run: PretrainConfig, spelling: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"a{suffix}")
    run.data.valid_path = str(tmp_path / spelling.format("a"))
    with pytest.raises(ConfigError, match="trains on"):
        check_data(run, ByteTokenizer())


def test_evaluating_on_a_copy_of_training_data_is_rejected(run: PretrainConfig, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        shutil.copyfile(tmp_path / f"a{suffix}", tmp_path / f"copy{suffix}")
    run.data.valid_path = [str(tmp_path / "copy")]
    with pytest.raises(ConfigError, match=r"^data.valid_path=.*/copy holds the same documents as .*/a, which the run"):
        check_data(run, ByteTokenizer())


@pytest.mark.parametrize("weights", [(), (0.3, 0.7)])
def test_a_dataset_named_twice_is_rejected(run: PretrainConfig, letters: dict[str, str], weights: Any) -> None:
    prefixes = (letters["a"], f"{letters['b']}/../a")
    run.data.path = [entry for pair in zip(weights, prefixes, strict=True) for entry in pair] if weights else prefixes
    with pytest.raises(ConfigError, match="names a dataset twice"):
        check_data(run, ByteTokenizer())


def test_held_out_data_shorter_than_a_sequence_are_rejected(run: PretrainConfig) -> None:
    run.train.seq_length = 5_000
    with pytest.raises(ConfigError, match=r"held-out part of .*b has 4,001 tokens"):
        check_data(run, ByteTokenizer())
