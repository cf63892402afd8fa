import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2train.data.bundled import bundled_corpus_files
from s2train.errors import ConfigError
from s2train.preparation.cutting import split_documents
from s2train.preparation.documents import documents_of, read_documents
from s2train.preparation.sources import Source


def documents(path: Path) -> list[str]:
    return list(read_documents(Source.of(path)))


@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 40))
def test_concatenated_documents_are_the_text_and_none_is_too_short_or_long(text: str, size: int) -> None:
    documents = list(split_documents(io.StringIO(text), size))
    assert "".join(documents) == text
    if len(text) >= size:
        assert all(size <= len(document) < 3 * size for document in documents)
    else:
        assert len(documents) == (1 if text else 0)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (
            "aaaa\nbbbb\n\ncccc\ndddd\n\neeee\nffff",
            "aaaa\nbbbb\n\n",
        ),  # at a blank line, although the end of a line is nearer
        ("aaaaaa\nbbbbbbbbbbbbbbbbbbbbbb", "aaaaaa\n"),  # at the end of a line, without a blank line
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaa"),  # anywhere, without either
    ],
)
def test_a_document_ends_at_a_blank_line_or_line_end_or_the_limit(text: str, first: str) -> None:
    assert next(split_documents(io.StringIO(text), 6)) == first


def test_long_files_are_cut_across_reads() -> None:
    text = bundled_corpus_files()[2].read_text() * 5  # longer than one read
    documents = list(split_documents(io.StringIO(text), 3000))
    assert "".join(documents) == text
    assert sum(document.endswith("\n") for document in documents) >= len(documents) - 1


def test_dos_line_ends_are_read_as_newlines(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"one\r\n\r\ntwo\r\n")
    assert documents(path) == ["one\n\ntwo\n"]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    texts = ["first\r\n\r\n" * 50, "zweite Zeile — é"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 3}) for text in texts) + "\n\n")
    assert documents(path) == texts


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", b'{"text": 3}\n', "line 1"),
        ("a.jsonl", b"[1, 2]\n", "line 1"),
        ("a.jsonl", b"not json\n", "line 1"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}.*{problem}"):
        documents(path)


def test_a_program_without_formats_is_advised_to_set_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("not json\n")
    with pytest.raises(ConfigError, match=r"^text=a: line 1 is not .*Repair that line$"):
        documents_of("text", "a", path, "text")


def test_documents_longer_than_memory_leave_a_short_text_whole(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a line. " * 1000)
    source = replace(Source.of(tmp_path / "text.txt"), document_chars=sys.maxsize)
    assert list(read_documents(source)) == ["a line. " * 1000]
