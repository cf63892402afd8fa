import json
import os
from pathlib import Path

import pytest

from s2train.data.bundled import bundled_corpus_files
from s2train.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError

TEXTS = [
    "",
    "plain",
    "naïve café — 東京 🦊\n\ttab\x00",
    "  spaces  kept  ",
    "a <|endoftext|> written out </s>",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe((file.read_text() for file in bundled_corpus_files()), 600, path)
    return path


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: Path) -> Tokenizer:
    return load_tokenizer("bytes" if request.param == "bytes" else str(bpe))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_encodes_to_the_end_of_document(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in [*ids, tokenizer.eod])


def test_decode_leaves_out_ends_of_documents(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.eod, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"


def test_decode_leaves_out_ids_that_only_a_models_vocabulary_has(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("one"), tokenizer.vocab_size, *tokenizer.encode("two")]) == "onetwo"


def test_bytes_decode_broken_utf8_to_replacement_characters() -> None:
    assert ByteTokenizer().decode("é!".encode()[1:]) == "\ufffd!"


def test_a_bpe_has_the_requested_size_and_shortens_text(bpe: Path) -> None:
    tokenizer = load_tokenizer(str(bpe))
    text = bundled_corpus_files()[0].read_text()[:2000]
    assert tokenizer.vocab_size == 600
    assert len(tokenizer.encode(text)) < 0.7 * len(text)


def test_truncation_and_padding_saved_in_a_file_are_not_applied(bpe: Path, tmp_path: Path) -> None:
    content = json.loads(bpe.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    text = bundled_corpus_files()[0].read_text()[:100]
    whole, tokenizer = load_tokenizer(str(bpe)).encode(text), load_tokenizer(str(path))
    assert tokenizer.encode(text) == whole
    assert tokenizer.encode_many([text, "a"])[0].tolist() == whole


def test_a_bpe_smaller_than_the_bytes_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="257"):
        train_bpe(["text"], 256, tmp_path / "t.json")


def test_fingerprints_depend_on_content(bpe: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.json", tmp_path / "other.json"
    copy.write_bytes(bpe.read_bytes())
    train_bpe(["other text"], 300, other)
    fingerprints = [load_tokenizer(str(path)).fingerprint for path in (bpe, copy, other)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize("end", ["</s>", "<eod>", "<|end_of_text|>"])
def test_the_end_of_document_is_found_by_its_default_names(bpe: Path, tmp_path: Path, end: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(bpe.read_text().replace("<|endoftext|>", end))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.eod == load_tokenizer(str(bpe)).eod


def test_a_tokenizer_without_end_of_document_is_rejected(bpe: Path, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(bpe.read_text().replace("<|endoftext|>", "<odd>"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*no end-of-document token"):
        load_tokenizer(str(path))


def test_a_file_that_is_not_a_tokenizer_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer=.*is not a Hugging Face tokenizer\.json"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["byte", f"no{os.sep}tokenizer.json", ""])
def test_a_name_that_is_not_a_file_is_rejected(name: str) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tokenizer(name)
