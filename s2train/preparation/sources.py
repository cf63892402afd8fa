"""Reads input files in pieces that can be tokenized independently.

Supports plain text, JSON lines and parquet; text and JSON lines may be compressed.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from s2train.errors import ConfigError
from s2train.preparation.compression import REPAIR, import_package, open_content
from s2train.preparation.cutting import split_documents
from s2train.preparation.formats import Format, find_format

PIECE_BYTES = 1 << 20  # approximate: a piece ends with a document
_SURROGATES = re.compile("[\ud800-\udfff]")


class BadDocumentError(ValueError):
    """Raised if a document can't be read.

    Args:
        problem: what is wrong, in words that follow a file's name.
        source: number of the document's source.
        remedy: what to do.
    """

    def __init__(self, problem: str, source: int, remedy: str = "Repair that line, or set format=text") -> None:
        super().__init__(problem, source, remedy)
        self.problem, self.source, self.remedy = problem, source, remedy


@dataclass(frozen=True)
class Source:
    """An input file, and how to read it.

    Attributes:
        document_chars: minimum characters of the documents that plain text is cut into; None: it is one document.
    """

    path: Path
    format: Format
    document_chars: int | None = None

    @classmethod
    def of(cls, path: Path, document_chars: int | None = None, given: str = "auto") -> "Source":
        """Create a source, and detect its format."""
        return cls(path, find_format(path, given), document_chars)


@dataclass(frozen=True)
class Documents:
    """Documents of a piece.

    Attributes:
        texts: texts of the documents; none is blank.
        numbers: number of each text's line, row or document in its file.
        blank: number of rows left out because they hold only white space.
        replaced: number of lone surrogates, which JSON allows and UTF-8 doesn't, replaced by U+FFFD.
    """

    texts: list[str]
    numbers: list[int]
    blank: int = 0
    replaced: int = 0


@dataclass(frozen=True)
class Piece:
    """Consecutive documents of one source.

    Attributes:
        source: number of the source.
        texts: the documents, or the bytes of JSON lines that hold them.
        unit: unit by which documents are numbered: line, row or document.
        first: number of the first line, row or document.
        position: bytes of the source's file read so far, for a progress bar.
    """

    source: int
    texts: list[str] | bytes
    unit: str
    first: int
    position: int

    def documents(self, text_key: str) -> Documents:
        """Extract the documents; JSON lines hold them under `text_key`.

        Raises:
            BadDocumentError: a line is not UTF-8, or not such JSON.
        """
        found, replaced = list[tuple[int, str]](), 0
        if isinstance(self.texts, list):
            found = list(enumerate(self.texts, start=self.first))
        else:
            for number, line in enumerate(self.texts.split(b"\n"), start=self.first):
                if not line.strip():
                    continue
                text = self._text_of(line, number, text_key)
                if b"\\u" in line:
                    text, count = _SURROGATES.subn("\ufffd", text)
                    replaced += count
                found.append((number, text))
        kept = [(number, text) for number, text in found if text and not text.isspace()]
        blank = 0 if self.unit == "document" else len(found) - len(kept)
        return Documents([text for _, text in kept], [number for number, _ in kept], blank, replaced)

    def _text_of(self, line: bytes, number: int, text_key: str) -> str:
        try:
            content = json.loads(line.decode())  # from bytes, json would accept surrogates, which are invalid UTF-8
            text = content[text_key]
        except KeyError as error:
            keys, remedy = ", ".join(content) or "none", "Set text_key to the key of the text, or repair that line"
            problem = f'line {number} has no "{text_key}", its keys: {keys}'
            raise BadDocumentError(problem, self.source, remedy) from error
        except UnicodeDecodeError as error:
            raise BadDocumentError(f"line {number} is not UTF-8 ({error})", self.source, "Repair that line") from error
        except (ValueError, TypeError) as error:
            raise BadDocumentError(
                f'line {number} is not a JSON object with a "{text_key}" ({error!r})', self.source
            ) from error
        if not isinstance(text, str):
            raise BadDocumentError(f'"{text_key}" of line {number} is not a string', self.source)
        return text


def read_pieces(source: Source, number: int, text_key: str) -> Iterator[Piece]:
    """Read a file in pieces, which are the same each time.

    Args:
        number: number of the source, stored in its pieces.

    Raises:
        ConfigError: on `input`; the file can't be read, or a package that is needed is not installed.
    """
    if source.format.kind == "parquet":
        yield from _parquet_pieces(source.path, number, text_key)
        return
    try:
        with open_content(source.path, source.format.compression) as (file, position):
            if source.format.kind == "jsonl":
                yield from _line_pieces(file, number, position)
            else:
                yield from _text_pieces(file, number, position, source.document_chars)
    except UnicodeDecodeError as error:
        raise ConfigError("input", source.path, f"is not UTF-8 ({error})", "Convert it, e.g. with iconv") from error


def _line_pieces(file: IO[bytes], source: int, position: Callable[[], int]) -> Iterator[Piece]:
    number = 1
    while lines := file.readlines(PIECE_BYTES):
        if number == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        yield Piece(source, b"".join(lines), "line", number, position())
        number += len(lines)


def _text_pieces(
    file: IO[bytes], source: int, position: Callable[[], int], document_chars: int | None
) -> Iterator[Piece]:
    decoded = io.TextIOWrapper(
        file, encoding="utf-8-sig"
    )  # kept in a variable: garbage collection would close the file
    if document_chars is None:
        yield Piece(source, [decoded.read()], "document", 1, position())
        return
    texts: list[str] = []
    number, size = 1, 0
    for text in split_documents(decoded, document_chars):
        texts.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            yield Piece(source, texts, "document", number, position())
            number += len(texts)
            texts, size = [], 0
    if texts:
        yield Piece(source, texts, "document", number, position())


def _parquet_pieces(path: Path, source: int, text_key: str) -> Iterator[Piece]:
    pyarrow, parquet = import_package("pyarrow", path), import_package("pyarrow.parquet", path)
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                remedy = f"Set text_key to one of {', '.join(names)}"
                raise ConfigError("text_key", text_key, f"{path} has no such column", remedy)
            rows, size, seen = max(1, file.metadata.num_rows), path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                texts: list[Any] = batch.column(0).to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    row = seen + next(i for i, text in enumerate(texts) if not isinstance(text, str))
                    raise ConfigError("input", path, f'"{text_key}" of row {row} is not a string', REPAIR)
                yield Piece(source, texts, "row", seen, size * (seen + len(texts)) // rows)
                seen += len(texts)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError("input", path, f"can't be read ({str(error).splitlines()[0]})", REPAIR) from error
