"""Which format an input file has, told by its content and its name."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from s2train.errors import ConfigError
from s2train.preparation.compression import Compression, opened

Kind = Literal["text", "jsonl", "parquet"]
KINDS = ("text", "jsonl", "parquet")
FORMATS = "text, JSON lines (.jsonl, .json, .ndjson), either as .gz, .zst, .bz2 or .xz, or .parquet"
_JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines")
_BY_SUFFIX: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}
_BY_CONTENT: dict[bytes, Compression] = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"BZh": "bz2",  # followed by a digit and the next
    b"\xfd7zXZ\x00": "xz",
}
_BZ2_BLOCK = b"1AY&SY"
# What isn't read, by the bytes at an offset: as text it would be rejected for its encoding at best.
_UNREAD = [
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
# These have no such bytes, or some that begin a text as well.
_UNREAD_SUFFIXES = {
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
    """What a file holds, what it is compressed by, and whether its content told that against its name."""

    kind: Kind
    compression: Compression = ""
    by_content: bool = False

    def __str__(self) -> str:
        kind = "JSON lines" if self.kind == "jsonl" else self.kind
        return kind + f" in {self.compression}" * bool(self.compression) + " by content" * self.by_content


def find_format(path: Path, given: str = "auto") -> Format:
    """The format of a file; its content decides where it is plain, else its name.

    A file whose first line is a JSON object holds JSON lines, whatever its name.

    Args:
        given: auto, or the kind to read it as.

    Raises ConfigError, on `input`: it can't be read, or has a format that isn't. On `format`: there is no such.
    """
    if given not in ("auto", *KINDS):
        raise ConfigError("format", given, "no such format", f"Set auto, {', '.join(KINDS)}")
    with opened(path) as (file, _):
        head = file.read(_HEAD)
        file.seek(-min(len(head), len(_PARQUET)), os.SEEK_END)
        is_table = head.startswith(_PARQUET) and file.read() == _PARQUET
    if is_table and given != "text":
        return Format("parquet")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    last = suffixes[-1] if suffixes else ""
    compression = _compression_of(head) or _BY_SUFFIX.get(last, "")
    if last in _BY_SUFFIX:
        suffixes = suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    if given == "auto" and last == ".parquet":
        return Format("parquet")  # a damaged one: for its reader to tell
    if given == "parquet":
        raise ConfigError("format", given, f"{path} holds no parquet table", "Set format=auto")
    with opened(path, compression) as (file, _):
        head = file.read(_HEAD)
        _check_read(path, head, last, given)
        if given != "auto":
            return Format("jsonl" if given == "jsonl" else "text", compression)
        text = head.removeprefix(_BOM).lstrip()
        if last in _JSON_LINES:
            if last == ".json" and text.startswith(b"["):
                remedy = f"Convert it: jq -c '.[]' {path} > {path.with_suffix('.jsonl')}, or set format=text"
                raise ConfigError("input", path, "is a JSON array, not one object a line", remedy)
            return Format("jsonl", compression)
        is_json = text.startswith(b"{") and _is_object(text, file)
    return Format("jsonl" if is_json else "text", compression, by_content=is_json)


def _compression_of(head: bytes) -> Compression:
    for start, compression in _BY_CONTENT.items():
        if head.startswith(start) and (compression != "bz2" or head[4:10] == _BZ2_BLOCK):
            return compression
    return ""


def _check_read(path: Path, head: bytes, suffix: str, given: str) -> None:
    remedy = f"Convert it to one of these: {FORMATS}"
    for offset, content, name in _UNREAD:
        if head[offset:].startswith(content):
            raise ConfigError("input", path, f"is {name}, which isn't read", remedy)
    if given == "auto" and suffix in _UNREAD_SUFFIXES:
        problem = f"is named as {_UNREAD_SUFFIXES[suffix]}, which isn't read"
        raise ConfigError("input", path, problem, f"{remedy}; or set format=text to train on it as it is")


def _is_object(head: bytes, file: IO[bytes]) -> bool:
    """Whether the first line, `head` and what follows in `file`, is a JSON object."""
    line = head if b"\n" in head else head + file.readline()
    try:
        return isinstance(json.loads(line.partition(b"\n")[0]), dict)
    except ValueError:
        return False
