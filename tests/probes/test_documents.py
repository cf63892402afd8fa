import json
from pathlib import Path

import pytest

from s2train.data.tokenizers import ByteTokenizer, load_tokenizer, train_bpe
from s2train.errors import ConfigError
from s2train.probes import documents
from s2train.probes.config import ProbesConfig
from s2train.probes.documents import Document, held_out_documents
from tests.probes.source_text import source

TEXT = source(1, 40, 5)


def test_an_occurrence_names_its_tokens(tmp_path: Path) -> None:
    train_bpe([TEXT], 300, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    document = Document.of(TEXT, tokenizer)
    found = [place for places in document.occurrences.values() for place in places]
    assert len(found) == 75  # definitions and calls
    for place in found:
        assert TEXT[place.start : place.stop] == place.name
        assert tokenizer.decode(document.ids[place.first : place.last].tolist()).strip(" \t(") == place.name


def test_a_text_cut_in_pieces_has_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Document.of(TEXT, ByteTokenizer())
    monkeypatch.setattr(documents, "SEGMENT", 100)
    cut = Document.of(TEXT, ByteTokenizer())
    assert (cut.ids == whole.ids).all()
    assert (cut.starts == whole.starts).all()
    assert (cut.stops == whole.stops).all()


def test_documents_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one line", "another line")))
    found = held_out_documents(ProbesConfig(text=str(path)), ByteTokenizer())
    assert [document.text for document in found] == ["one line", "another line"]


@pytest.mark.parametrize(("content", "problem"), [(None, "no such file"), ("", "holds no text"), ("{", "JSON")])
def test_a_text_without_documents_is_rejected(tmp_path: Path, content: str | None, problem: str) -> None:
    path = tmp_path / "held-out.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        held_out_documents(ProbesConfig(text=str(path)), ByteTokenizer())
    assert caught.value.setting == "text"
