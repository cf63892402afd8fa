"""Detects the format of a file from content and name."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from s2train.errors import ConfigError
from s2train.preparation.compression import Compression, open_content

Kind = Literal["text", "jsonl", "parquet"]
KINDS = ("text", "jsonl", "parquet")
FORMATS = "text, JSON lines (.jsonl, .json, .ndjson), either as .gz, .zst, .bz2 or .xz, or .parquet"
_JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines")
# Suffixes are the names with a dot; files begin with these bytes.
_COMPRESSIONS: dict[Compression, re.Pattern[bytes]] = {
    "gz": re.compile(rb"\x1f\x8b"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh.1AY&SY", re.DOTALL),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
}
# Unsupported formats, by the bytes at an offset. Read as text, they would at best be rejected for their encoding.
_UNSUPPORTED = [
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"\x04\x22\x4d\x18", "lz4"),
    (0, b"\x1f\x9d", "compressed by compress"),
    (0, b"ARROW1\x00", "an Arrow file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"%PDF-", "a PDF"),
    (257, b"ustar\x00", "a tar archive"),
    (257, b"ustar  \x00", "a tar archive"),
]
# Unsupported formats without such bytes, or with bytes that a text may begin with.
_UNSUPPORTED_SUFFIXES = {
    ".br": "brotli",
    ".csv": "comma-separated values",
    ".lz": "lzip",
    ".lzma": "lzma",
    ".orc": "an ORC table",
    ".tsv": "tab-separated values",
}
_HEAD = 512
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Format:
    """Format of a file.

    Attributes:
        kind: what the file holds.
        compression: how it is compressed.
        by_content: whether its content determined the kind, although its name says otherwise.
    """

    kind: Kind
    compression: Compression = ""
    by_content: bool = False

    def __str__(self) -> str:
        kind = "JSON lines" if self.kind == "jsonl" else self.kind
        return kind + f" in {self.compression}" * bool(self.compression) + " by content" * self.by_content


def find_format(path: Path, given: str = "auto") -> Format:
    """Detect a file's format from its content, or its name.

    A file whose first line is a JSON object holds JSON lines, whatever its name.

    Args:
        given: auto, or the kind to read it as.

    Raises:
        ConfigError: on `input`: the file can't be read, or its format is not supported. On `format`: there is no such
            format, or the file doesn't have it.
    """
    if given not in ("auto", *KINDS):
        raise ConfigError("format", given, "no such format", f"Set auto, {', '.join(KINDS)}")
    with open_content(path) as (file, _):
        head = file.read(_HEAD)
        file.seek(-min(len(head), len(_PARQUET)), os.SEEK_END)
        is_table = head.startswith(_PARQUET) and file.read() == _PARQUET
    if is_table and given != "text":
        return Format("parquet")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    by_suffix: Compression = next((name for name in _COMPRESSIONS if last == f".{name}"), "")
    compression: Compression = next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), by_suffix)
    if by_suffix:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    if given == "auto" and last == ".parquet":
        return Format("parquet")  # damaged: its reader raises the error
    if given == "parquet":
        raise ConfigError("format", given, f"{path} holds no parquet table", "Set format=auto")
    with open_content(path, compression) as (file, _):
        head = file.read(_HEAD)
        _check_supported(path, head, last, given)
        if given != "auto":
            return Format("jsonl" if given == "jsonl" else "text", compression)
        text = head.removeprefix(_BOM).lstrip()
        if last in _JSON_LINES:
            if last == ".json" and text.startswith(b"["):
                remedy = f"Convert it: jq -c '.[]' {path} > {path.with_suffix('.jsonl')}, or set format=text"
                raise ConfigError("input", path, "is a JSON array, not one object per line", remedy)
            return Format("jsonl", compression)
        is_json = text.startswith(b"{") and _is_object(text, file)
    return Format("jsonl" if is_json else "text", compression, by_content=is_json)


def _check_supported(path: Path, head: bytes, suffix: str, given: str) -> None:
    remedy = f"Convert it to one of these: {FORMATS}"
    for offset, content, name in _UNSUPPORTED:
        if head[offset:].startswith(content):
            raise ConfigError("input", path, f"is {name}, which is not supported", remedy)
    if given == "auto" and suffix in _UNSUPPORTED_SUFFIXES:
        problem = f"its name says {_UNSUPPORTED_SUFFIXES[suffix]}, which is not supported"
        raise ConfigError("input", path, problem, f"{remedy}; or set format=text to train on it as it is")


def _is_object(head: bytes, file: IO[bytes]) -> bool:
    """Whether the first line is a JSON object.

    The line starts with `head` and continues in `file`.
    """
    line = head if b"\n" in head else head + file.readline()
    try:
        return isinstance(json.loads(line.partition(b"\n")[0]), dict)
    except ValueError:
        return False
