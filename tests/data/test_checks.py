import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from s2train.config import PretrainConfig
from s2train.data.blend import Blend, parse_blend
from s2train.data.bundled import bundled_corpus_files
from s2train.data.checks import check_data, num_train_samples
from s2train.data.indexed import read_document_lengths
from s2train.data.splits import megatron_split, split_documents_range
from s2train.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare
from tests.data_fixtures import write_dataset

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def copy(corpus: str, tmp_path: Path) -> str:
    """Prefix of a copy of the corpus that a test may damage."""
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(corpus + suffix, tmp_path / f"copy{suffix}")
    return str(tmp_path / "copy")


def assert_rejected(cfg: PretrainConfig, setting: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        check_data(cfg, ByteTokenizer())
    assert error.value.setting == setting


def truncate(path: str, size: int) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:size])


def test_valid_data_pass(corpus: str, tmp_path: Path, config: MakeConfig) -> None:
    check_data(config(corpus), ByteTokenizer())
    other = write_dataset(tmp_path / "other", [f"text {number} " * 400 for number in range(20)])
    check_data(config([0.3, corpus, 0.7, other]), ByteTokenizer())


@pytest.mark.parametrize("weights", [[0.3, 0.7], None])
def test_a_blend_of_a_dataset_and_its_copy_is_rejected(
    corpus: str, copy: str, config: MakeConfig, weights: list[float] | None
) -> None:
    blend = [corpus, copy] if weights is None else [weights[0], corpus, weights[1], copy]
    assert_rejected(config(blend), "data.path", rf"{copy} holds the same documents as {corpus}\. Name one of them")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(copy: str, config: MakeConfig, suffix: str) -> None:
    Path(copy + suffix).unlink()
    assert_rejected(config(copy), "data.path", rf"copy\{suffix} is missing")


@pytest.mark.parametrize("size", [0, 20, 100, -1])
def test_a_truncated_index_is_rejected(copy: str, config: MakeConfig, size: int) -> None:
    truncate(f"{copy}.idx", size)
    assert_rejected(config(copy), "data.path", r"copy\.idx is (empty or )?truncated")


def test_truncated_tokens_are_rejected(copy: str, config: MakeConfig) -> None:
    truncate(f"{copy}.bin", -2)
    assert_rejected(config(copy), "data.path", r"copy\.bin has [\d,]+ bytes, but its \.idx describes")


def test_a_file_that_is_not_an_index_is_rejected(copy: str, config: MakeConfig) -> None:
    Path(f"{copy}.idx").write_bytes(b"x" * 100)
    assert_rejected(config(copy), "data.path", "is not a Megatron index")


def test_a_dataset_without_tokens_is_rejected(tmp_path: Path, config: MakeConfig) -> None:
    IndexedDatasetBuilder(str(tmp_path / "none.bin")).finalize(str(tmp_path / "none.idx"))
    assert_rejected(config(str(tmp_path / "none")), "data.path", "holds no tokens")


def test_a_file_given_as_prefix_is_rejected_with_the_prefix_to_set(copy: str, config: MakeConfig) -> None:
    assert_rejected(config(f"{copy}.bin"), "data.path", rf"Set {copy}$")


def test_a_broken_sidecar_is_rejected(copy: str, config: MakeConfig) -> None:
    Path(f"{copy}.json").write_text("{")
    assert_rejected(config(copy), "data.path", "sidecar")


def test_data_without_a_sidecar_pass(copy: str, config: MakeConfig) -> None:
    Path(f"{copy}.json").unlink()
    check_data(config(copy), ByteTokenizer())


def test_data_made_with_another_tokenizer_are_rejected(corpus: str, config: MakeConfig, tmp_path: Path) -> None:
    output = str(tmp_path / "bpe")
    prepare(
        PrepareConfig(input=str(bundled_corpus_files()[0]), output=output, tokenizer="bpe:300", document_chars=5000)
    )
    assert_rejected(config(output, seq_length=16, vocab_size=300), "data.tokenizer", rf"{output}-tokenizer\.json")
    check_data(config(output, seq_length=16, vocab_size=300), load_tokenizer(f"{output}-tokenizer.json"))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_rejected(corpus: str, config: MakeConfig) -> None:
    assert_rejected(config(corpus, vocab_size=256), "model.vocab_size", r"257 ids.*Set model\.vocab_size=257 or more")
    assert_rejected(config("mock", vocab_size=256), "model.vocab_size", "257 ids")


def test_a_moved_tokenizer_is_recognized_by_its_content(tmp_path: Path, config: MakeConfig) -> None:
    train_bpe(["text of a tokenizer " * 20], 280, tmp_path / "here.json")
    source, output = str(bundled_corpus_files()[0]), str(tmp_path / "out")
    prepare(PrepareConfig(input=source, output=output, tokenizer=str(tmp_path / "here.json"), document_chars=5000))
    (tmp_path / "here.json").rename(tmp_path / "there.json")
    check_data(config(output, vocab_size=300), load_tokenizer(str(tmp_path / "there.json")))


def test_a_sample_longer_than_a_part_of_the_data_is_rejected(corpus: str, config: MakeConfig) -> None:
    lengths = read_document_lengths(corpus)
    held_out = int(lengths[round(0.9 * len(lengths)) :].sum())
    check_data(config(corpus, seq_length=held_out - 1), ByteTokenizer())
    assert_rejected(config(corpus, seq_length=held_out), "train.seq_length", f"held-out.*Set {held_out - 1} or less")
    check_data(config(corpus, seq_length=held_out, evaluate=False), ByteTokenizer())
    assert_rejected(config(corpus, seq_length=10**6, evaluate=False), "train.seq_length", "train part")


def test_a_part_without_documents_is_rejected_if_the_run_reads_it(corpus: str, config: MakeConfig) -> None:
    assert_rejected(config(corpus, split="99.9,0.1,0"), "data.split", "held-out")
    assert_rejected(config(corpus, split="100"), "data.split", "held-out")
    assert_rejected(config(corpus, split="0,100,0", evaluate=False), "data.split", "train")
    check_data(config(corpus, split="100", evaluate=False), ByteTokenizer())


@pytest.mark.parametrize("documents", [1, 2, 4, 40])
def test_the_remedy_for_a_part_without_documents_gives_it_some(
    tmp_path: Path, config: MakeConfig, documents: int
) -> None:
    cfg = config(write_dataset(tmp_path / "a", ["some words of text"] * documents), seq_length=16, split="100")
    with pytest.raises(ConfigError, match="without any of its") as error:
        check_data(cfg, ByteTokenizer())
    words = dict(word.split("=", 1) for word in shlex.split(error.value.remedy) if "=" in word)
    cfg.data.split = yaml.safe_load(words["data.split"])
    if documents == 1:
        cfg.evaluation.interval = int(words["evaluation.interval"])
        assert "document_chars" in words
    check_data(cfg, ByteTokenizer())


def test_mock_data_are_split_like_other_data(config: MakeConfig) -> None:
    check_data(config("mock"), ByteTokenizer())
    assert_rejected(config("mock", split="100,0,0"), "data.split", "held-out part of mock data without any")
    check_data(config("mock", split="100,0,0", evaluate=False), ByteTokenizer())


def test_a_held_out_part_too_short_for_a_sequence_matters_only_to_evaluation(config: MakeConfig) -> None:
    settings = {"split": "99.999,0.001,0", "seq_length": 5000}
    with pytest.raises(ConfigError, match=r"the held-out part of mock data .*, or evaluation.interval=0"):
        check_data(config("mock", **settings), ByteTokenizer())
    check_data(config("mock", **settings, evaluate=False), ByteTokenizer())


@pytest.mark.parametrize("wrong", [None, -2, 50_000])
def test_masked_tokens_are_accepted_in_data_of_other_tools(
    wrong: int | None, config: MakeConfig, tmp_path: Path
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "other.bin"), dtype=np.int32)
    for _ in range(60):
        builder.add_document(np.array([97, -1, 97 if wrong is None else wrong] * 20, dtype=np.int32), [60])
    builder.finalize(str(tmp_path / "other.idx"))
    cfg = config(str(tmp_path / "other"))
    if wrong is None:
        check_data(cfg, ByteTokenizer())
    else:
        assert_rejected(cfg, "model.vocab_size", f"holds the id {wrong:,}")


def test_ids_outside_the_vocabulary_are_rejected_if_no_sidecar_names_the_tokenizer(
    copy: str, config: MakeConfig
) -> None:
    Path(f"{copy}.json").unlink()
    ids = np.memmap(f"{copy}.bin", dtype=np.uint16, mode="r+")
    for place in (0, -1):
        before, ids[place] = ids[place], 50_000
        ids.flush()
        assert_rejected(config(copy), "model.vocab_size", r"copy\.bin holds the id 50,000")
        check_data(config(copy, vocab_size=50_001), ByteTokenizer())
        ids[place] = before
        ids.flush()
    check_data(config(copy), ByteTokenizer())


def test_a_cache_that_cannot_be_written_is_rejected(corpus: str, config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file" / "cache", tmp_path / "file", ""):
        cfg = config(corpus)
        cfg.data.cache = str(cache)
        assert_rejected(cfg, "data.cache", "no folder")


def test_the_check_does_not_create_the_cache(corpus: str, config: MakeConfig, tmp_path: Path) -> None:
    check_data(config(corpus), ByteTokenizer())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "split",
    [
        *("", "a,b", "90;10", "-1,2", "0,0,0", "1,1,1,1", "90,", "nan"),
        *([], [-1, 2], [0, 0], [1, 1, 1, 1], ["90", "10"], [float("inf"), 1], [float("nan")]),
        *(None, True, {"train": 1}),
    ],
)
def test_a_split_that_is_not_weights_is_rejected(corpus: str, config: MakeConfig, split: Any) -> None:
    assert_rejected(config(corpus, split=split), "data.split", "weights")


@pytest.mark.parametrize(
    "split", ["90,10,0", "90.0,10", "90, 10", "90/10", "9/1/0", [90, 10, 0], [90, 10], (0.9, 0.1, 0.0)]
)
def test_a_split_is_text_or_a_list(split: Any) -> None:
    assert split_documents_range(split, 100) == (range(90), range(90, 100), range(100, 100))
    assert megatron_split("90.0,10") == megatron_split([90, 10, 0]) == "90,10,0"


@pytest.mark.parametrize("split", [100, "100"])
def test_one_weight_means_training_only(split: Any) -> None:
    assert split_documents_range(split, 7) == (range(7), range(7, 7), range(7, 7))


def test_small_weights_reach_megatron_exactly() -> None:
    assert parse_and_normalize_split(megatron_split([1.0, 1e-7])) == pytest.approx([1, 1e-7, 0])


def test_the_remedy_of_a_split_works_when_pasted_into_a_shell() -> None:
    with pytest.raises(ConfigError) as error:
        split_documents_range("x", 1)
    (argument,) = [word for word in shlex.split(error.value.remedy) if word.startswith("data.split=")]
    cfg = compose_run(["+model=tiny_hybrid", argument])
    assert split_documents_range(cfg.data.split, 10)[0] == range(9)


def test_splits_are_rounded_like_megatrons() -> None:
    rng = np.random.default_rng()
    for _ in range(200):
        split = ",".join(f"{weight:.3f}" for weight in rng.dirichlet([3, 1, 1]) * 100)  # exponents are rejected
        documents = int(rng.integers(1, 300))
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        theirs = [range(round(part[0] * documents), round(part[1] * documents)) for part in matrix if part]
        ours = split_documents_range(split, documents)
        assert [part for part in ours if part] == [part for part in theirs if part], (split, documents)


@pytest.mark.parametrize(("setting", "value"), [("train.steps", 10**12), ("data.num_samples", 10**12)])
def test_an_order_of_far_too_many_epochs_is_rejected(corpus: str, config: MakeConfig, setting: str, value: int) -> None:
    section, name = setting.split(".")
    cfg = config(corpus)
    setattr(getattr(cfg, section), name, value)
    with pytest.raises(
        ConfigError, match=rf"^{setting}={value}: one order of samples would hold .* epochs of"
    ) as error:
        check_data(cfg, ByteTokenizer())
    assert "Set fewer" in error.value.remedy


def test_the_order_has_the_samples_of_all_steps_or_the_number_set(corpus: str, config: MakeConfig) -> None:
    assert num_train_samples(config(corpus, steps=10)) == 40
    assert num_train_samples(config(corpus, steps=10, num_samples=50)) == 50


@pytest.mark.parametrize(
    ("path", "blend"),
    [
        ("a", Blend(("a",), (1.0,))),
        (["a"], Blend(("a",), (1.0,))),
        ([3, "a", 1, "b"], Blend(("a", "b"), (0.75, 0.25))),
        ("mock", Blend((), ())),
        ("bundled", Blend(("runs/data/bundled",), (1.0,))),
    ],
)
def test_a_path_is_a_name_or_a_weighted_list(path: Any, blend: Blend) -> None:
    assert parse_blend(path) == blend


@pytest.mark.parametrize(
    "path", [None, [], 3, [1, "a", "b"], ["a", 1], [0, "a", 1, "b"], [True, "a"], ["mock", "a"], [1, 2]]
)
def test_a_path_that_is_neither_is_rejected(path: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.path="):
        parse_blend(path)
