"""Documents out of text and JSON-lines files, read as streams."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from s2train.errors import ConfigError

_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*(?<=\n)")


def read_documents(path: Path, document_chars: int) -> Iterator[str]:
    """Documents of a UTF-8 file, in order.

    A `.jsonl` file holds one document a line, under the key "text". Any other file is plain text, cut into
    documents by `split_documents`; its line ends are read as "\\n".

    Raises ConfigError, on `input`, for a file that holds no text, no UTF-8, or no such JSON.
    """
    empty = True
    try:
        with path.open(encoding="utf-8-sig") as file:
            is_jsonl = path.suffix == ".jsonl"
            documents = _jsonl_texts(file, path) if is_jsonl else split_documents(file, document_chars)
            for document in documents:
                if document:
                    empty = empty and document.isspace()
                    yield document
    except UnicodeDecodeError as error:
        raise ConfigError("input", path, f"is not UTF-8 ({error})", "Convert it, e.g. with iconv") from error
    if empty:
        raise ConfigError("input", path, "holds no text", "Leave it out, or give another file")


def split_documents(file: TextIO, document_chars: int) -> Iterator[str]:
    """Cut a long text into documents that, joined, are the text again.

    Each has at least `document_chars` characters (unless the text has fewer) and less than three times as
    many. It ends at the first blank line after `document_chars` characters, else, where none comes within as
    many again, at a line's end, else anywhere.
    """
    buffer = ""
    while chunk := file.read(max(1 << 20, document_chars)):
        buffer += chunk
        start = 0
        while len(buffer) - start >= 3 * document_chars:
            stop = _cut(buffer, start, document_chars)
            yield buffer[start:stop]
            start = stop
        buffer = buffer[start:]
    if len(buffer) >= 2 * document_chars:
        stop = _cut(buffer, 0, document_chars)
        if len(buffer) - stop >= document_chars:
            yield buffer[:stop]
            buffer = buffer[stop:]
    if buffer:
        yield buffer


def _cut(text: str, start: int, document_chars: int) -> int:
    first, last = start + document_chars, start + 2 * document_chars
    if match := _BLANK_LINE.search(text, first - 1, last):
        return match.end()
    end_of_line = text.find("\n", first - 1, last)
    return last if end_of_line < 0 else end_of_line + 1


def _jsonl_texts(file: TextIO, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            problem = f'line {number} is no JSON object with a "text" ({error!r})'
            raise ConfigError("input", path, problem, "Mend that line") from error
        if not isinstance(text, str):
            raise ConfigError("input", path, f'"text" of line {number} is no string', "Mend that line")
        yield text
