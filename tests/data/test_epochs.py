"""A run logs how many epochs of each dataset it takes, and warns of too many."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from s2train.config import DataConfig
from s2train.data.blend import BUNDLED_PREFIX
from s2train.data.epochs import describe_epochs, training_epochs
from s2train.data.tokenizers import train_bpe
from s2train.errors import ConfigError
from s2train.planning import compose_run, epochs_of_plan
from s2train.preparation.bundled_corpus import ensure_prepared
from tests.data.test_datasets import MakeConfig, build


@pytest.fixture
def datasets(tmp_path: Path) -> list[str]:
    """Two datasets of ten documents each, of 100 and of 1,000 tokens."""
    prefixes = []
    for length in (100, 1000):
        prefixes.append(str(tmp_path / str(length)))
        builder = IndexedDatasetBuilder(f"{prefixes[-1]}.bin", dtype=np.uint8)
        for _ in range(10):
            builder.add_document(torch.full((length,), 65), [length])
        builder.finalize(f"{prefixes[-1]}.idx")
    return prefixes


def test_epochs_count_the_training_part(datasets: list[str]) -> None:
    (found,) = training_epochs(DataConfig(path=datasets[1], split="90,10,0"), 900, 100)
    assert (found.tokens, found.share) == (9000, 1)
    assert found.epochs == pytest.approx(10, rel=1e-3)


def test_megatron_takes_the_computed_number_of_epochs(config: MakeConfig, corpus: str) -> None:
    cfg = config(corpus)
    for samples in (5, 30_000):
        train, _ = build(cfg, samples)
        (found,) = training_epochs(cfg.data, samples, cfg.train.seq_length)
        # Megatron shuffles whole epochs, and the last sample needs one token more.
        assert len(train) / samples == pytest.approx(np.ceil(found.epochs) / found.epochs, abs=2 / samples)


def test_epochs_of_a_blend_follow_its_weights(datasets: list[str]) -> None:
    small, large = datasets
    data = DataConfig(path=[0.5, small, 0.5, large], split="100,0,0")
    one, two = training_epochs(data, 1000, 10)
    assert (one.prefix, two.prefix) == (small, large)
    assert one.epochs == pytest.approx(5, rel=2e-3)
    assert two.epochs == pytest.approx(0.5, rel=2e-3)
    lines = describe_epochs(data, [one, two])
    assert lines[0] == f"{small}: 5.01 epochs of 1,000 training tokens, 0.5 of the samples"
    assert len(lines) == 3
    assert lines[2].startswith(f"warning: the run takes 5.01 epochs of {small}, above data.warn_epochs=4.")


def test_a_blend_without_weights_takes_equal_epochs_of_all(datasets: list[str]) -> None:
    one, two = training_epochs(DataConfig(path=datasets, split="100,0,0"), 2200, 10)
    assert one.epochs == pytest.approx(two.epochs, rel=2e-3)


def test_a_dataset_named_twice_is_counted_once(datasets: list[str]) -> None:
    data = DataConfig(path=[0.3, datasets[0], 0.4, datasets[1], 0.3, datasets[0]], split="100,0,0")
    one, _ = training_epochs(data, 1000, 10)
    assert one.share == pytest.approx(0.6)
    assert one.epochs == pytest.approx(6, rel=2e-3)


def test_the_limit_is_a_setting(datasets: list[str]) -> None:
    data = DataConfig(path=datasets[0], split="100,0,0", warn_epochs=6)
    assert len(describe_epochs(data, training_epochs(data, 500, 10))) == 1
    warned = describe_epochs(data, training_epochs(data, 700, 10))[-1]
    assert warned.endswith("set data.warn_epochs=8")


def test_mock_data_have_no_epochs() -> None:
    data = DataConfig(path="mock")
    assert describe_epochs(data, training_epochs(data, 1 << 40, 8192)) == ["mock: synthetic, without epochs"]


def test_a_split_that_leaves_nothing_to_train_on_is_rejected(datasets: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"data\.split"):
        training_epochs(DataConfig(path=datasets[0], split="0,100,0"), 10, 10)


def test_the_bundled_corpus_is_counted_before_it_is_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose_run(["+model=tiny_hybrid"])
    (before,) = training_epochs(cfg.data, 1000, 256)
    assert not (tmp_path / BUNDLED_PREFIX).with_suffix(".idx").exists()
    ensure_prepared(cfg)
    (after,) = training_epochs(cfg.data, 1000, 256)
    assert before.epochs == pytest.approx(after.epochs, rel=0.2)


def test_a_plan_shows_epochs_or_that_the_data_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many = epochs_of_plan(compose_run(["+model=tiny_hybrid", "train.steps=100000"]))
    assert "data          runs/data/bundled: " in many
    assert " epochs of runs/data/bundled, above data.warn_epochs" in many
    away = epochs_of_plan(compose_run(["+model=tiny_hybrid", "data.path=elsewhere"]))
    assert "epochs not counted: data.path=elsewhere: elsewhere.idx is missing" in away


def test_a_plan_warns_of_a_tokenizer_larger_than_the_vocabulary(corpus: str) -> None:
    settings = ["+model=tiny_hybrid", f"data.path={corpus}", "parallel.tp=2"]
    fitting, small = (epochs_of_plan(compose_run([*settings, f"model.vocab_size={size}"])) for size in (258, 128))
    assert "model.vocab_size" not in fitting
    assert "has 257 ids, more than model.vocab_size=128" in small
    assert "Set model.vocab_size=258 or more, a multiple of parallel.tp, and data.tokenizer=bytes" in small


def test_a_plan_warns_of_data_that_another_tokenizer_made(corpus: str, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    train_bpe(["some words to learn from"] * 9, 260, other)
    settings = ["+model=tiny_hybrid", f"data.path={corpus}", "model.vocab_size=512"]
    same, differs, away = (
        epochs_of_plan(compose_run([*settings, f"data.tokenizer={name}"])) for name in ("bytes", other, "away.json")
    )
    assert "another tokenizer" not in same + away
    assert f"{corpus} was made with another tokenizer than data.tokenizer={other}" in differs
    assert differs.endswith("so that the run will be rejected. Set data.tokenizer=bytes")
