"""Input files as pieces that can be tokenized by themselves: plain text, JSON lines and parquet, compressed or not."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from s2train.data.cutting import split_documents
from s2train.errors import ConfigError

PIECE_BYTES = 1 << 20  # about; a piece ends with a document
FORMATS = "text, .jsonl, either as .gz or .zst, or .parquet"
_MEND = "Mend it, or leave it out"


class BadDocumentError(ValueError):
    """What is wrong with a document, in words that follow a file's name, the number of its source, and the remedy."""

    def __init__(self, problem: str, source: int, remedy: str = "Mend that line") -> None:
        super().__init__(problem, source, remedy)
        self.problem, self.source, self.remedy = problem, source, remedy


@dataclass(frozen=True)
class Piece:
    """Documents in a row of one source.

    Attributes:
        source: its number.
        texts: the documents, or JSON lines that hold them, as bytes.
        first_line: number of the first of those lines.
        position: bytes of the source's file that were read so far, for a progress bar.
    """

    source: int
    texts: list[str] | bytes
    first_line: int
    position: int

    def documents(self, text_key: str) -> Iterator[str]:
        """Its documents, without empty ones; JSON lines have theirs under `text_key`.

        Raises:
            BadDocumentError: a line is no such JSON, or no UTF-8.
        """
        if isinstance(self.texts, list):
            yield from filter(None, self.texts)
            return
        for number, line in enumerate(self.texts.split(b"\n"), start=self.first_line):
            if line.strip() and (text := self._text_of(line, number, text_key)):
                yield text

    def _text_of(self, line: bytes, number: int, text_key: str) -> str:
        try:
            text = json.loads(line)[text_key]
        except KeyError as error:
            keys, remedy = ", ".join(json.loads(line)) or "none", "Set text_key to the text's, or mend that line"
            problem = f'line {number} has no "{text_key}", its keys: {keys}'
            raise BadDocumentError(problem, self.source, remedy) from error
        except UnicodeDecodeError as error:
            raise BadDocumentError(f"line {number} is not UTF-8 ({error})", self.source) from error
        except (ValueError, TypeError) as error:
            raise BadDocumentError(
                f'line {number} is no JSON object with a "{text_key}" ({error!r})', self.source
            ) from error
        if not isinstance(text, str):
            raise BadDocumentError(f'"{text_key}" of line {number} is no string', self.source)
        if b"\\u" in line:  # halves of surrogate pairs, which JSON can hold and UTF-8 can't
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text


def read_pieces(path: Path, source: int, document_chars: int, text_key: str) -> Iterator[Piece]:
    """A file in pieces, the same each time; by its name .jsonl, .parquet, or plain text cut into documents.

    Raises:
        ConfigError: on `input`: it can't be read, or a package to read it with is not installed.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_pieces(path, source, text_key)
            return
        with _opened(path) as (file, position):
            if _without_compression(path).suffix == ".jsonl":
                yield from _line_pieces(file, source, position)
            else:
                yield from _text_pieces(file, source, position, document_chars)
    except UnicodeDecodeError as error:
        raise ConfigError("input", path, f"is not UTF-8 ({error})", "Convert it, e.g. with iconv") from error
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError("input", path, f"can't be read ({error})", _MEND) from error


def _line_pieces(file: IO[bytes], source: int, position: Callable[[], int]) -> Iterator[Piece]:
    number = 1
    while lines := file.readlines(PIECE_BYTES):
        if number == 1:
            lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        yield Piece(source, b"".join(lines), number, position())
        number += len(lines)


def _text_pieces(file: IO[bytes], source: int, position: Callable[[], int], document_chars: int) -> Iterator[Piece]:
    texts: list[str] = []
    size = 0
    decoded = io.TextIOWrapper(file, encoding="utf-8-sig")  # named: once collected it would close the file
    for text in split_documents(decoded, document_chars):
        texts.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            yield Piece(source, texts, 1, position())
            texts, size = [], 0
    if texts:
        yield Piece(source, texts, 1, position())


def _parquet_pieces(path: Path, source: int, text_key: str) -> Iterator[Piece]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _lacks("pyarrow", path) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                remedy = f"Set text_key to one of {', '.join(names)}"
                raise ConfigError("text_key", text_key, f"{path} has no such column", remedy)
            rows, size, seen = max(1, file.metadata.num_rows), path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                texts: list[Any] = batch.column(0).to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    row = seen + next(i for i, text in enumerate(texts) if not isinstance(text, str))
                    raise ConfigError("input", path, f'"{text_key}" of row {row} is no string', _MEND)
                seen += len(texts)
                yield Piece(source, texts, 1, size * seen // rows)
    except pyarrow.ArrowException as error:
        raise ConfigError("input", path, f"can't be read ({str(error).splitlines()[0]})", _MEND) from error


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".gz", ".zst") else path


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The content of a file, and how many bytes of the file itself were read."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw)), raw.tell
        elif path.suffix == ".zst":
            yield io.BufferedReader(_Zstandard(raw, path), 1 << 20), raw.tell
        else:
            yield raw, raw.tell


class _Zstandard(io.RawIOBase):
    """The content of zstandard frames, one after the other; zstandard's own reader takes a file cut off for whole."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise _lacks("zstandard", path) from error
        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._raw, self._frame, self._ready = raw, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(1 << 17)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            self._ready = memoryview(self._decompress(chunk))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, chunk: bytes) -> bytes:
        content = []
        while chunk:
            frame: Any = self._decompressor.decompressobj() if self._frame is None else self._frame
            try:
                content.append(frame.decompress(chunk))
            except self._error as error:
                raise OSError(str(error)) from error
            self._frame, chunk = (None, frame.unused_data) if frame.eof else (frame, b"")
        return b"".join(content)


def _lacks(package: str, path: Path) -> ConfigError:
    return ConfigError(
        "input", path, f"reading it takes {package}, which is not installed", "pip install s2train[data]"
    )
