"""Cuts long texts into documents."""

import re
from collections.abc import Iterator
from typing import TextIO

_MOST_CHARS = 1 << 26  # read at once: Python allocates what is asked for, however short the file
_BLANK_LINE = re.compile(r"\n[ \t]*\n\s*(?<=\n)")


def split_documents(file: TextIO, document_chars: int) -> Iterator[str]:
    """Cut a long text into documents whose concatenation is the text.

    A document has at least `document_chars` characters (unless the text has fewer) and fewer than three times that. It
    ends between `document_chars` and twice that: at the first blank line, or else at the first end of a line, or else
    at the upper limit.
    """
    buffer = ""
    while chunk := file.read(min(max(1 << 20, document_chars), _MOST_CHARS)):
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
