"""The training order continues after the epochs that a run began with; earlier samples keep their order."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.config import PretrainConfig
from s2train.data.datasets import build_datasets
from s2train.data.tokenizers import ByteTokenizer
from tests.data_fixtures import write_dataset

MakeConfig = Callable[..., PretrainConfig]
Sample = tuple[int, ...]


@pytest.fixture
def numbers(tmp_path: Path) -> Callable[[str], str]:
    """Function that makes a dataset of 40 different documents, each one sample long, that begin with `letter`."""

    def make(letter: str) -> str:
        return write_dataset(tmp_path / letter, [f"{letter}{number:02d}" + "x" * 28 for number in range(40)])

    return make


def order(cfg: PretrainConfig, begun_for: int, last: int) -> list[Sample]:
    """Samples [0, last) of a run that began with `begun_for` samples."""
    train, _ = build_datasets(cfg, ByteTokenizer(), begun_for, 2, last_sample=last)
    built: Any = train
    return [tuple(built[i]["tokens"].tolist()) for i in range(last)]


@pytest.mark.parametrize("begun_for", [1, 20, 33, 40, 50, 70, 71, 200])
def test_the_first_samples_stay_however_long_the_order_becomes(
    numbers: Callable[[str], str], config: MakeConfig, begun_for: int
) -> None:
    cfg = config(numbers("a"), seq_length=32)
    begun = order(cfg, begun_for, begun_for)
    assert order(cfg, begun_for, begun_for + 150)[:begun_for] == begun
    assert order(cfg, begun_for, begun_for + 150) == order(cfg, begun_for, begun_for + 300)[: begun_for + 150]


def test_every_further_epoch_takes_each_document_once_in_another_order(
    numbers: Callable[[str], str], config: MakeConfig
) -> None:
    cfg = config(numbers("a"), seq_length=32)
    epoch = (36 * 32 - 1) // 32  # of the 36 documents for training; the last label of the last one is missing
    samples = order(cfg, 20, 5 * epoch)
    epochs = [samples[start : start + epoch] for start in range(0, len(samples), epoch)]
    for taken in epochs:
        assert set(Counter(taken).values()) == {1}
        texts = "".join(chr(token) for sample in taken for token in sample)
        assert sum(f"a{number:02d}" in texts for number in range(40)) >= epoch
    assert len({tuple(taken) for taken in epochs}) == len(epochs)


@pytest.mark.usefixtures("world_of_one")
def test_the_first_samples_and_the_weights_of_a_blend_stay(numbers: Callable[[str], str], config: MakeConfig) -> None:
    cfg = config([0.8, numbers("a"), 0.2, numbers("b")], seq_length=32)
    begun, longer = order(cfg, 40, 40), order(cfg, 40, 200)
    assert longer[:40] == begun
    assert sum(ord("a") in sample for sample in longer[40:]) == 128
    assert order(cfg, 40, 120) == longer[:120]


def test_mock_data_get_further_epochs_too(config: MakeConfig) -> None:
    cfg = config("mock", seq_length=10_000_000)  # six samples per epoch
    begun, longer = (build_datasets(cfg, ByteTokenizer(), 2, 2, last_sample=last)[0] for last in (0, 15))
    assert len(longer) >= 15  # type: ignore[arg-type]
    assert torch.equal(begun[0]["tokens"], longer[0]["tokens"])  # type: ignore[index]


def test_an_order_with_enough_samples_gets_no_further_epochs(corpus: str, config: MakeConfig) -> None:
    cfg = config(corpus)
    (train, _), (longer, _) = (
        build_datasets(cfg, ByteTokenizer(), 40, 5, last_sample=last)
        for last in (0, 5000)  # both within the first epoch
    )
    assert type(train) is type(longer)
    assert torch.equal(train[39]["tokens"], longer[39]["tokens"])  # type: ignore[index]
