"""Data preparation, training and evaluation use the same end token, which no text holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from s2train.config import PretrainConfig
from s2train.data.checks import check_data
from s2train.data.end_token import run_tokenizer
from s2train.data.tokenizers import load_tokenizer
from s2train.errors import ConfigError
from s2train.needles.config import NeedleDocumentsConfig
from s2train.preparation.config import PrepareConfig
from s2train.preparation.prepare import prepare

MakeConfig = Callable[..., PretrainConfig]
WORDS = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3, "<eos>": 4, "<fin>": 5}


@pytest.fixture
def words(tmp_path: Path) -> str:
    """A tokenizer of whole words, among them </s>, with added tokens <eos> and <fin>."""
    tokenizer = hf.Tokenizer(hf.models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([hf.AddedToken("<eos>", special=False), hf.AddedToken("<fin>", special=True)])
    tokenizer.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


@pytest.fixture
def settings(words: str, tmp_path: Path) -> PrepareConfig:
    """Settings for documents that spell out </s>."""
    lines = ["a b", "", "a </s> b", *(["b a <oov> b"] * 40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return PrepareConfig(input=str(tmp_path / "a.jsonl"), output=str(tmp_path / "out"), tokenizer=words)


def test_a_text_that_encodes_to_the_end_of_document_is_rejected_with_its_position(settings: PrepareConfig) -> None:
    message = r"a\.jsonl: the text of line 3 holds the end token </s> \(id 3\) in 'a </s> b'.*set end_token"
    with pytest.raises(ConfigError, match=message):
        prepare(settings)


def test_a_setting_names_another_end_token(settings: PrepareConfig) -> None:
    made = prepare(replace(settings, end_token="<fin>"))
    assert made.end_token == "<fin>"
    documents = IndexedDataset(settings.output)
    ids = [documents[i].tolist() for i in range(len(documents))]
    assert all(document.count(5) == 1 and document[-1] == 5 for document in ids)
    assert [1, 3, 2, 5] in ids


@pytest.mark.parametrize("end", ["<eos>", "<fin>"])
def test_an_added_end_token_is_encoded_as_plain_text(words: str, end: str) -> None:
    content = json.loads(Path(words).read_text())
    del content["model"]["vocab"][end]  # the model has no such word: only the added token has the id
    Path(words).write_text(json.dumps(content))
    tokenizer = load_tokenizer(words, end_token=end)
    assert tokenizer.encode(f"a {end} b") == [1, 0, 2]


def test_the_first_default_end_token_is_used(words: str) -> None:
    assert load_tokenizer(words).end_token == "</s>"


def test_a_missing_end_token_is_rejected_with_those_that_exist(settings: PrepareConfig) -> None:
    message = (
        r"^end_token=<end>: .*words\.json has no such token\. It has <eos>, <fin>\. Set one: 'end_token=\"<eos>\"'"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(replace(settings, end_token="<end>"))
    with pytest.raises(ConfigError, match=r"^data\.end_token=<end>: "):
        load_tokenizer(settings.tokenizer, end_token="<end>")


def test_bytes_reject_a_named_end_token(settings: PrepareConfig) -> None:
    with pytest.raises(ConfigError, match=r"^end_token=<eos>: .*documents end with the id 256"):
        prepare(replace(settings, tokenizer="bytes", end_token="<eos>"))


def test_a_bpe_is_trained_with_the_requested_end_token(settings: PrepareConfig) -> None:
    made = prepare(replace(settings, tokenizer="bpe:262", end_token="<eos>"))
    assert load_tokenizer(made.tokenizer).end_token == made.end_token == "<eos>"


def test_needle_documents_with_the_end_token_inside_are_rejected(tmp_path: Path) -> None:
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        ["number"], hf.trainers.BpeTrainer(initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    tokenizer.save(str(tmp_path / "t.json"))
    needles = NeedleDocumentsConfig(task="single", documents=2)
    with pytest.raises(ConfigError, match=r"^end_token=e: sentences of the needles or the haystack hold"):
        prepare(PrepareConfig("needles", str(tmp_path / "out"), str(tmp_path / "t.json"), "e", needles=needles))


def test_a_run_takes_the_end_token_of_its_data_into_its_settings(settings: PrepareConfig, config: MakeConfig) -> None:
    prepare(replace(settings, end_token="<fin>"))
    cfg, tokenizer = run_tokenizer(config(settings.output, tokenizer=settings.tokenizer, seq_length=4))
    assert (cfg.data.end_token, tokenizer.end_token, tokenizer.eod) == ("<fin>", "<fin>", 5)
    check_data(cfg, tokenizer)


def test_the_default_end_token_is_not_written_into_a_runs_settings(settings: PrepareConfig, config: MakeConfig) -> None:
    (Path(settings.output).parent / "a.jsonl").write_text('{"text": "a b a b"}\n' * 40)
    prepare(settings)
    cfg, tokenizer = run_tokenizer(config(settings.output, tokenizer=settings.tokenizer))
    assert (cfg.data.end_token, tokenizer.end_token) == (None, "</s>")


def test_a_run_with_another_end_token_than_its_data_is_rejected(settings: PrepareConfig, config: MakeConfig) -> None:
    prepare(replace(settings, end_token="<fin>"))
    wanted = config(settings.output, tokenizer=settings.tokenizer, end_token="<eos>", seq_length=4)
    message = r"^data.end_token=<eos>: .*out was prepared with the end token <fin>\. Set 'data\.end_token=\"<fin>\"'"
    with pytest.raises(ConfigError, match=message):
        check_data(*run_tokenizer(wanted))


def test_a_blend_of_different_end_tokens_is_rejected_by_both_names(settings: PrepareConfig, config: MakeConfig) -> None:
    paths = []
    for name, end in (("one", "<eos>"), ("two", "<fin>")):
        paths.append(str(Path(settings.output).with_name(name)))
        prepare(replace(settings, output=paths[-1], end_token=end))
    message = (
        rf"^data\.path=.*two was prepared with the end token <fin>, but {paths[0]} with <eos>\. Prepare one of them"
    )
    with pytest.raises(ConfigError, match=message):
        check_data(*run_tokenizer(config(paths, tokenizer=settings.tokenizer, seq_length=4)))


def test_data_whose_sidecar_names_no_end_token_end_with_the_default_one(
    settings: PrepareConfig, config: MakeConfig
) -> None:
    (Path(settings.output).parent / "a.jsonl").write_text('{"text": "a b a b"}\n' * 40)
    prepare(settings)
    sidecar = Path(f"{settings.output}.json")
    old = ("tokenizer", "fingerprint", "vocab_size", "documents", "tokens", "unigram_entropy", "sources")
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({name: content[name] for name in old}))
    cfg, tokenizer = run_tokenizer(config(settings.output, tokenizer=settings.tokenizer, seq_length=4))
    check_data(cfg, tokenizer)
    assert tokenizer.end_token == "</s>"


def test_attention_within_documents_needs_documents_with_the_tokenizers_end_token(
    words: str, tmp_path: Path, config: MakeConfig
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for _ in range(40):
        builder.add_document(np.array([1, 2, 5]), [3])
    builder.finalize(str(tmp_path / "theirs.idx"))
    theirs = config(str(tmp_path / "theirs"), tokenizer=words, seq_length=4)
    check_data(*run_tokenizer(theirs))
    theirs.data.attention_within_documents = True
    with pytest.raises(ConfigError, match=r"^data.attention_within_documents=true: none of the first 40 documents"):
        check_data(*run_tokenizer(theirs))
    theirs.data.end_token = "<fin>"
    check_data(*run_tokenizer(theirs))
