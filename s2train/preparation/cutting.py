"""Long texts cut into documents."""

import re
from collections.abc import Iterator
from typing import TextIO

_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*(?<=\n)")


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
