import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.preparation.documents import read_documents
from s2train.preparation.inputs import files_named
from s2train.preparation.sources import PIECE_BYTES, Source, read_pieces

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")


def random_texts(count: int) -> list[str]:
    letters = "ab é—\n"
    return ["x" + "".join(random.choices(letters, k=random.randint(0, 60))) for _ in range(count)]


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write(path: Path, texts: list[str], key: str = "text") -> Path:
    """Write `texts` in the format of the file's name."""
    content = json_lines(texts, key)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        middle = len(content) // 2  # two frames, cut anywhere
        path.write_bytes(b"".join(zstandard.compress(part) for part in (content[:middle], content[middle:])))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": range(len(texts)), key: texts}), path, row_group_size=7)
    else:
        path.write_bytes(content)
    return path


def documents(path: Path, document_chars: int | None = None, text_key: str = "text") -> list[str]:
    return list(read_documents(Source.of(path, document_chars), text_key))


FORMATS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("key", ["text", "content"])
def test_every_format_gives_its_documents(tmp_path: Path, name: str, key: str) -> None:
    texts = random_texts(50)
    assert documents(write(tmp_path / name, texts, key), text_key=key) == texts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_cut_like_plain_text(tmp_path: Path, suffix: str) -> None:
    content = "\n\n".join(random_texts(300)).encode()
    (tmp_path / "a.txt").write_bytes(content)
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    assert documents(tmp_path / f"a.txt{suffix}", 100) == documents(tmp_path / "a.txt", 100)


@pytest.mark.parametrize("name", FORMATS)
def test_a_long_file_is_read_in_pieces_up_to_its_end(tmp_path: Path, name: str) -> None:
    texts = [random.choice("ab") * 5000 for _ in range(2 * PIECE_BYTES // 5000 + 3000)]
    path = write(tmp_path / name, texts)
    pieces = list(read_pieces(Source.of(path), 3, "text"))
    assert len(pieces) > 2
    assert [text for piece in pieces for text in piece.documents("text").texts] == texts
    positions = [piece.position for piece in pieces]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size
    assert {piece.source for piece in pieces} == {3}


def test_a_line_deep_in_a_file_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json_lines(["x" * 1000]) * (2 * PIECE_BYTES // 1000)
    path.write_bytes(good + b"{}\n")
    with pytest.raises(ConfigError, match=rf'line {good.count(b"{") + 1} has no "text", its keys: none'):
        documents(path)


def test_a_line_whose_text_has_another_key_names_its_keys_and_the_setting(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 3, "content": "x"}\n')
    with pytest.raises(ConfigError, match=r'line 1 has no "text", its keys: id, content\. Set text_key'):
        documents(tmp_path / "a.jsonl")


def test_a_line_that_is_not_an_object_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["x"]\n')
    with pytest.raises(ConfigError, match=r'line 1 is not a JSON object with a "text".* Repair that line'):
        documents(tmp_path / "a.jsonl")


def test_a_lone_surrogate_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert documents(tmp_path / "a.jsonl") == ["a\ufffdb", "\U0001f600"]


@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_file_is_rejected(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / name, random_texts(500))
    content = path.read_bytes()
    # a .parquet file is recognized by its end, the others by their beginning
    overwritten = content[:-2] + b"no" if name == "a.parquet" else b"no" + content[2:]
    path.write_bytes(content[: len(content) * 3 // 4] if damage == "truncated" else overwritten)
    with pytest.raises(ConfigError, match=rf"^input=.*{name}: can't be read.*Repair the file, or leave it out"):
        documents(path)


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_format_whose_package_is_missing_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    path = write(tmp_path / name, ["a"])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package}, which is not installed. pip install s2train\[data\]"):
        documents(path)


def test_the_error_for_a_missing_column_lists_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ["a"], key="content")
    with pytest.raises(ConfigError, match=r"text_key=text: .* no such column. Set text_key to one of id, content"):
        documents(path)


def test_a_row_without_text_is_rejected_by_its_number(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r'"text" of row 1 is not a string'):
        documents(tmp_path / "a.parquet")


def test_a_file_whose_own_name_has_a_star_is_read_alone(tmp_path: Path) -> None:
    named, other = tmp_path / "a*.txt", tmp_path / "ab.txt"
    for file in (named, other):
        file.write_text("text")
    assert files_named(str(named), "input") == [named]
