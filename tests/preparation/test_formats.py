"""An input file's format is recognized by its content and its name."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.preparation.documents import read_documents
from s2train.preparation.formats import find_format
from s2train.preparation.sources import Source

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = ["first", "x" * 3000, "last"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def documents(path: Path, given: str = "auto") -> list[str]:
    return list(read_documents(Source.of(path, given=given)))


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.ndjson", "a.jsonlines", "a.JSONL", "a.Json", "a.txt", "part-0"]
)
def test_json_lines_are_detected_under_any_name(tmp_path: Path, name: str) -> None:
    assert documents(written(tmp_path / name, LINES)) == TEXTS


@pytest.mark.parametrize("line", [{"text": "x" * 3000}, {"id": 1, "text": "short"}])
def test_json_lines_are_detected_by_their_first_line_however_long(tmp_path: Path, line: dict[str, str]) -> None:
    path = written(tmp_path / "a.txt", b"\xef\xbb\xbf\n" + json.dumps(line).encode() + b"\n" + LINES)
    assert str(find_format(path)) == "JSON lines by content"
    assert documents(path) == [line["text"], *TEXTS]


@pytest.mark.parametrize("content", ["plain", "{ in braces }", '{"half": ', "[1, 2]", '"quoted"\n', "{}[]\n", ""])
def test_other_text_is_text(tmp_path: Path, content: str) -> None:
    assert find_format(written(tmp_path / "a.txt", content.encode())).kind == "text"


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["a.jsonl.{}", "a.json.{}", "a.JSONL.{}", "a.{}", "a.txt"])
def test_compression_is_detected_by_content_too(tmp_path: Path, compression: str, name: str) -> None:
    path = written(tmp_path / name.format(compression), COMPRESS[compression](LINES))
    assert find_format(path).compression == compression
    assert documents(path) == TEXTS


@pytest.mark.parametrize("compression", ["bz2", "xz"])
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_compressed_file_is_rejected(tmp_path: Path, compression: str, damage: str) -> None:
    content = COMPRESS[compression]("".join(map(str, range(20_000))).encode())
    content = content[: len(content) // 2] if damage == "truncated" else content[:3000] + b"no" + content[3002:]
    with pytest.raises(ConfigError, match=r"^input=.*: can't be read.*Repair the file, or leave it out"):
        documents(written(tmp_path / f"a.txt.{compression}", content))


def test_a_table_is_detected_under_any_name(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "part-0")
    assert documents(tmp_path / "part-0") == TEXTS


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:  # type: ignore[call-overload]
            file.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.zip", archive("zip"), "is a zip archive"),
        ("a.txt", archive("w"), "is a tar archive"),
        ("a.tgz", archive("w:gz"), "is a tar archive"),
        ("a.tar.xz", archive("w:xz"), "is a tar archive"),
        ("a.pdf", b"%PDF-1.7 and more", "is a PDF"),
        ("a.csv", b"text\nfirst\n", "its name says comma-separated values.* or set format=text"),
        ("a.txt.br", b"plain", "its name says brotli"),
        ("a.json", b' [{"text": "a"}]', r"is a JSON array, not one object per line. Convert it: jq -c '\.\[\]'"),
    ],
    # an archive's bytes hold the time, and ids must be the same in all of pytest's processes
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unsupported_format_is_rejected_by_its_name(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^input=.*{problem}"):
        find_format(written(tmp_path / name, content))


def test_a_format_that_is_set_overrides_content_and_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", LINES)
    assert documents(path, "text") == [LINES.decode()]
    assert documents(written(tmp_path / "a.csv", b"a,b"), "text") == ["a,b"]
    assert documents(written(tmp_path / "a.csv", LINES), "jsonl") == TEXTS


@pytest.mark.parametrize(("given", "problem"), [("csv", "no such format"), ("parquet", "holds no parquet table")])
def test_an_impossible_format_is_rejected(tmp_path: Path, given: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^format={given}: .*{problem}"):
        find_format(written(tmp_path / "a.txt", b"plain"), given)
