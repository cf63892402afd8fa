import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from s2train.config import PretrainConfig
from s2train.data.blend import BUNDLED_PREFIX
from s2train.data.bundled import bundled_corpus_files
from s2train.data.checks import check_data, num_train_samples
from s2train.data.datasets import build_datasets
from s2train.data.tokenizers import ByteTokenizer
from s2train.errors import ConfigError
from s2train.preparation.bundled_corpus import ensure_prepared
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare
from tests.data_fixtures import write_dataset

MakeConfig = Callable[..., PretrainConfig]
TOKENIZER = ByteTokenizer()
END = chr(TOKENIZER.eod)
ORDERS = range(30), range(29, -1, -1)


def build(cfg: PretrainConfig, train: int | None = None, valid: int = 5) -> tuple[Any, Any]:
    train = num_train_samples(cfg) if train is None else train
    return build_datasets(cfg, TOKENIZER, train, valid)


def text_of(ids: torch.Tensor | np.ndarray) -> str:
    """Text of ASCII bytes, with `END` for the end of a document."""
    return "".join(map(chr, ids.tolist()))


def tokens(dataset: Any, n: int) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(n)])


@pytest.fixture
def two_letters(tmp_path: Path) -> list[str]:
    """Prefixes of two datasets: one of letters a, and one of letters b, three times as large."""
    texts = {"a": ("a" * 60 + "\n") * 400, "b": ("b" * 60 + "\n") * 1200}
    return [write_dataset(tmp_path / letter, text, document_chars=1000) for letter, text in texts.items()]


def test_runs_that_share_a_cache_build_one_at_a_time(corpus: str, config: MakeConfig) -> None:
    cfg = config(corpus)
    Path(cfg.data.cache).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        with FileLock(Path(cfg.data.cache) / "building.lock"):
            built = pool.submit(build, cfg)
            time.sleep(0.5)
            assert not built.done()
            assert not list(Path(cfg.data.cache).rglob("*.npy"))
        assert len(built.result(timeout=400)[0]) > 0


@pytest.mark.usefixtures("world_of_one")
def test_the_order_does_not_depend_on_the_path(
    corpus: str, two_letters: list[str], config: MakeConfig, tmp_path: Path
) -> None:
    a, b = corpus, two_letters[1]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for prefix, name in ((a, "a"), (b, "b")):
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(prefix + suffix, elsewhere / f"{name}{suffix}")
    for here, there in (([a], [f"{elsewhere}/a"]), ([0.3, a, 0.7, b], [0.3, f"{elsewhere}/a", 0.7, f"{elsewhere}/b"])):
        (train, valid), (moved_train, moved_valid) = build(config(here)), build(config(there))
        assert torch.equal(tokens(train, 40), tokens(moved_train, 40))
        assert torch.equal(tokens(valid, 5), tokens(moved_valid, 5))


@pytest.mark.parametrize("seq_length", [64, 1000])
def test_a_sample_is_text_of_the_corpus_and_labels_are_the_next_tokens(
    corpus: str, config: MakeConfig, seq_length: int
) -> None:
    texts = [file.read_text() for file in bundled_corpus_files()]
    train, _ = build(config(corpus, seq_length=seq_length))
    whole = 0
    for i in range(30):
        sample = train[i]
        assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
        assert all(value.shape == (seq_length,) for value in sample.values())
        assert sample["tokens"].dtype == sample["position_ids"].dtype == torch.int64
        assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
        assert torch.equal(sample["position_ids"], torch.arange(seq_length))
        assert bool((sample["loss_mask"] == 1).all())
        pieces = text_of(sample["tokens"]).split(END)
        whole += len(pieces) == 1
        for piece in pieces:
            assert any(piece in text for text in texts)
    assert whole > 0


def test_masked_tokens_of_one_sample_count_in_the_others(config: MakeConfig, tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.int32)
    document = np.repeat(np.array([97, -1], dtype=np.int32), 25)  # of another tool, which masks tokens by -1
    for _ in range(60):
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "other.idx"))
    cfg = config(str(tmp_path / "other"), split="1", evaluate=False)
    read = [build(cfg, train=30, valid=0)[0] for _ in range(2)]  # as by two processes
    masks = [torch.stack([dataset[i]["loss_mask"] for i in order]) for dataset, order in zip(read, ORDERS, strict=True)]
    assert 0 < masks[0].mean() < 1
    assert torch.equal(masks[0], masks[1].flip(0))


def test_an_epoch_takes_every_token_once(corpus: str, config: MakeConfig) -> None:
    cfg = config(corpus, split="100,0,0", evaluate=False)
    dataset = IndexedDataset(corpus)
    number = (int(dataset.sequence_lengths.sum()) - 1) // 64
    train, _ = build(cfg, train=number, valid=0)
    seen = np.bincount(tokens(train, number).flatten(), minlength=257)
    there = np.bincount(np.fromfile(f"{corpus}.bin", dtype=np.uint16), minlength=257)
    assert (seen <= there).all()
    assert there.sum() - seen.sum() <= 65  # the rest doesn't fill a sample


def test_held_out_samples_share_no_document_with_training(corpus: str, config: MakeConfig) -> None:
    train, valid = build(config(corpus, seq_length=32))
    assert set(train.indices).isdisjoint(valid.indices)
    documents = IndexedDataset(corpus)
    held_out = [text_of(documents[int(i)]) for i in valid.indices]
    for i in range(len(valid)):
        for piece in text_of(valid[i]["tokens"]).split(END):
            assert any(piece in document for document in held_out)


@pytest.mark.usefixtures("world_of_one")
def test_evaluation_seed_alone_orders_the_held_out_samples(
    corpus: str, two_letters: list[str], config: MakeConfig
) -> None:
    for path, apart in ((corpus, None), ([0.4, two_letters[0], 0.6, corpus], None), (two_letters, corpus)):
        cfg, found = config(path), []
        cfg.data.valid_path = apart
        for seed, held_out_seed in ((1234, 1234), (7, 1234), (7, None), (7, 7)):
            cfg.seed, cfg.evaluation.seed = seed, held_out_seed
            found.append([tokens(dataset, 5) for dataset in build(cfg)])
        (train, valid), (other_train, same), (again, own), (_, also) = found
        assert torch.equal(valid, same)
        assert torch.equal(own, also)
        assert torch.equal(other_train, again)
        assert not torch.equal(train, other_train)
        assert not torch.equal(valid, own)


def test_two_builds_give_the_same_order(corpus: str, config: MakeConfig, tmp_path: Path) -> None:
    first, cached = build(config(corpus))[0], build(config(corpus))[0]
    elsewhere = config(corpus)
    elsewhere.data.cache = str(tmp_path / "another")
    again = build(elsewhere)[0]
    assert torch.equal(tokens(first, 40), tokens(cached, 40))
    assert torch.equal(tokens(first, 40), tokens(again, 40))


def test_the_order_stays_when_steps_change_but_num_samples_does_not(corpus: str, config: MakeConfig) -> None:
    several_epochs = 40_000
    short = build(config(corpus, steps=10, num_samples=several_epochs))[0]
    long = build(config(corpus, steps=5000, num_samples=several_epochs, evaluate=False), valid=0)[0]
    unfixed = build(config(corpus, steps=5000))[0]
    assert torch.equal(tokens(short, 100), tokens(long, 100))
    assert not torch.equal(tokens(short, 100), tokens(unfixed, 100))


def test_another_seed_gives_another_order(corpus: str, config: MakeConfig) -> None:
    one, other = build(config(corpus, seed=1))[0], build(config(corpus, seed=2))[0]
    assert not torch.equal(tokens(one, 40), tokens(other, 40))


def test_small_data_are_repeated_to_give_all_samples(corpus: str, config: MakeConfig) -> None:
    train, valid = build(config(corpus, seq_length=4096), train=1000, valid=300)
    assert len(train) >= 1000
    assert len(valid) >= 300
    assert train[999]["tokens"].shape == (4096,)


def test_data_prepared_again_are_not_read_by_an_old_index(tmp_path: Path, config: MakeConfig) -> None:
    text, prefix = tmp_path / "a.txt", str(tmp_path / "a")
    for size in (200, 20):  # an index of the larger would exceed the smaller
        text.write_text("some words\n" * 20 * size)
        prepare(PrepareConfig(input=str(text), output=prefix, document_chars=300, overwrite=True))
        train, _ = build(config(prefix), train=50)
        assert len(train.indices) == round(0.9 * len(IndexedDataset(prefix)))
        assert tokens(train, 50).max() <= 256


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("size", [1, 7, 400])
def test_a_blend_samples_by_its_weights(two_letters: list[str], config: MakeConfig, size: int) -> None:
    a, b = two_letters
    train, valid = build(config([0.6, a, 0.4, b]), train=size, valid=size)
    for dataset in (train, valid):
        assert len(dataset) == size
        share = np.mean([bool((dataset[i]["tokens"] == ord("a")).any()) for i in range(size)])
        assert abs(share - 0.6) <= 1 / size


@pytest.mark.usefixtures("world_of_one")
def test_a_blend_without_weights_samples_in_proportion_to_tokens(two_letters: list[str], config: MakeConfig) -> None:
    train, _ = build(config(two_letters), train=400)
    share = np.mean([bool((train[i]["tokens"] == ord("a")).any()) for i in range(400)])
    assert share == pytest.approx(0.25, abs=0.01)


def test_unused_parts_are_not_built(corpus: str, config: MakeConfig) -> None:
    # The test part has no documents; Megatron would never finish building it.
    train, valid = build(config(corpus, split="98,1.9,0.1", evaluate=False), valid=0)
    assert len(train) >= 40
    assert valid is None


def test_mock_data_need_no_files_and_stay_in_the_vocabulary(config: MakeConfig, tmp_path: Path) -> None:
    cfg = config("mock", seq_length=512)
    check_data(cfg, TOKENIZER)
    train, valid = build(cfg)
    assert len(train) >= 40
    assert len(valid) >= 5
    assert set(train[0]) == {"tokens", "labels", "loss_mask", "position_ids"}
    assert int(tokens(train, 40).max()) <= TOKENIZER.eod
    assert not torch.equal(train[0]["tokens"], train[1]["tokens"])


def test_the_bundled_corpus_is_prepared_on_first_use_and_then_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MakeConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config("bundled")
    ensure_prepared(cfg)
    index = Path(f"{BUNDLED_PREFIX}.idx")
    made = index.stat().st_mtime_ns
    ensure_prepared(cfg)
    assert index.stat().st_mtime_ns == made
    check_data(cfg, TOKENIZER)
    assert len(build(cfg)[0]) >= 40


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_the_bundled_corpus_is_prepared_again_if_a_file_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MakeConfig, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = config("bundled")
    ensure_prepared(cfg)
    Path(BUNDLED_PREFIX + suffix).unlink()
    ensure_prepared(cfg)
    check_data(cfg, TOKENIZER)
    assert Path(BUNDLED_PREFIX + suffix).is_file()


def test_a_working_directory_that_cannot_hold_the_bundled_corpus_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MakeConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match=r"data\.path"):
        ensure_prepared(config("bundled"))


def test_a_split_given_as_a_list_builds_the_same_samples(corpus: str, config: MakeConfig) -> None:
    listed, text = (build(config(corpus, split=split))[0] for split in ([90, 10, 0], "90,10,0"))
    assert torch.equal(tokens(listed, 40), tokens(text, 40))


def test_other_data_do_not_prepare_the_bundled_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: MakeConfig
) -> None:
    monkeypatch.chdir(tmp_path)
    ensure_prepared(config("mock"))
    ensure_prepared(config(["x", "y"]))
    ensure_prepared(config(3))  # `check_data` rejects it
    assert not (tmp_path / "runs").exists()
