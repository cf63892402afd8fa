"""Turns tokens into text as they come, and prints texts in order."""

from collections.abc import Sequence
from typing import TextIO

from s2train.data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to


class TextStream:
    """Decodes a prompt's continuation token by token.

    Text comes when its characters are complete. All parts together are the text that `Tokenizer.decode` adds to the
    prompt's.

    Args:
        prompt: tokens before the first one; their end may change how the next is decoded.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._printed = len(self._ids)  # tokens whose text was given
        self._begin = 0  # decoding starts at this token: all before it is given

    def add(self, token: int) -> str:
        """Return the text that a token completes; may be empty."""
        self._ids.append(token)
        before, text = self._decoded()
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._begin, self._printed = self._printed, len(self._ids)
        return text[len(before) :]

    def end(self) -> str:
        """Return what is left: incomplete characters, as U+FFFD."""
        before, text = self._decoded()
        self._printed = len(self._ids)
        return text[len(before) :]

    def _decoded(self) -> tuple[str, str]:
        before = self._tokenizer.decode(self._ids[self._begin : self._printed])
        return before, self._tokenizer.decode(self._ids[self._begin :])


_CONTEXT = 8  # tokens of a prompt: more than a character has


class Terminal:
    """Prints the texts of several sequences, one below the other.

    The first unfinished text appears as it grows; those below it when it is finished.

    Args:
        titles: printed above each text; empty: no line.
        waits: print each text only when it is complete.
    """

    def __init__(self, out: TextIO, titles: Sequence[str], waits: bool = False) -> None:
        self._out, self._titles, self._waits = out, titles, waits
        self._parts: list[list[str]] = [[] for _ in titles]
        self._finished = [False] * len(titles)
        self._current = 0
        self._title_is_due = True

    def add(self, number: int, text: str) -> None:
        """Add to a text."""
        self._parts[number].append(text)
        self._print()

    def finish(self, number: int) -> None:
        """End a text with a line end."""
        self._finished[number] = True
        self._print()

    def _print(self) -> None:
        while self._current < len(self._titles):
            own, is_finished = self._parts[self._current], self._finished[self._current]
            if self._waits and not is_finished:
                return
            if self._title_is_due and self._titles[self._current]:
                self._out.write(f"{self._titles[self._current]}\n")
            self._title_is_due = False
            self._out.write("".join(own) + "\n" * is_finished)
            self._out.flush()
            own.clear()
            if not is_finished:
                return
            self._current, self._title_is_due = self._current + 1, True
