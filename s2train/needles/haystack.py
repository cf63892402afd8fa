"""Draws filler as text or tokens, cut between sentences."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from s2train.data.inside_text import encode_inside
from s2train.data.tokenizers import Offsets, Tokenizer
from s2train.errors import ConfigError

_LONGEST = 64  # maximum tokens between two cuts


@dataclass(frozen=True)
class Filler:
    """Tokens in which needles are hidden.

    Attributes:
        tokens: int64 [n].
        borders: int64 [k], ascending: positions at which something may be inserted, from 0 to n.
    """

    tokens: np.ndarray
    borders: np.ndarray


@dataclass(frozen=True)
class FillerText:
    """Text in which needles are hidden, slightly longer than requested.

    The caller removes the surplus from its first tokens.

    Attributes:
        sentences: each begins with the blank before it.
        borders: int64 [sentences + 1], ascending: tokens before each sentence, and their total, after that removal.
        more: returns the sentence before the first one, then the one before that, and so on; needed if the whole text
            has fewer tokens than its sentences together.
    """

    sentences: list[str]
    borders: np.ndarray
    more: Callable[[], str]


class Haystack:
    """A ring of sentences, each tokenized separately.

    Args:
        text: cut at ends of sentences, and inside sentences of more than 64 tokens (a list, a language with other full
            stops), because a needle is inserted at the nearest cut.
    Raises:
        ConfigError: `text` has no words.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text)]
        encoded: list[list[int]] = []
        self._texts: list[str] = []
        for sentence in (f" {sentence}" for sentence in sentences if sentence):
            ids, offsets = encode_inside(tokenizer, sentence)
            for first, stop in _cuts(offsets):
                encoded.append(ids[first:stop])
                self._texts.append(sentence[offsets[first - 1][1] if first else 0 : offsets[stop - 1][1]])
        if not encoded:
            raise ConfigError("haystack", repr(text[:20]), "holds no text", "Name a file with sentences")
        self._ring = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self._ends = np.cumsum([len(ids) for ids in encoded])  # index in the ring after each sentence
        self._is_start = np.zeros(len(self._ring), dtype=bool)
        self._is_start[self._ends % len(self._ring)] = True

    def draw(self, rng: np.random.Generator, length: int) -> Filler:
        """Draw `length` consecutive tokens that end with a sentence.

        Only the first sentence can be incomplete.
        """
        stop = int(rng.choice(self._ends))
        index = np.arange(stop - length, stop) % len(self._ring)
        starts = np.flatnonzero(self._is_start[index])
        return Filler(self._ring[index], np.unique(np.concatenate([[0], starts, [length]])))

    def draw_text(self, rng: np.random.Generator, length: int) -> FillerText:
        """Draw like `draw`, with the same random numbers, as text."""
        lengths = np.diff(self._ends, prepend=0)
        last = int(np.searchsorted(self._ends, rng.choice(self._ends)))
        rounds = length // len(self._ring) + 1  # enough sentences in any case
        index = np.arange(last - rounds * len(lengths), last + 1) % len(lengths)
        counts = lengths[index][::-1].cumsum()[::-1]  # tokens from each of these sentences to the end
        first = int(np.searchsorted(-counts, -length, side="right")) - 1 if length else len(index)
        borders = length - np.append(counts[first:], 0)
        backwards = (self._texts[i % len(lengths)] for i in _down_from(last - (len(index) - first)))
        sentences = [self._texts[i] for i in index[first:]]
        return FillerText(sentences, np.maximum(borders, 0), backwards.__next__)


def fill_with(tokenizer: Tokenizer, sentences: Iterator[str], length: int) -> FillerText:
    """Take sentences until they have `length` tokens, in reverse order.

    Args:
        sentences: an endless iterator.
    """
    taken: list[str] = []
    counts: list[int] = []
    total = 0
    while total < length:
        taken.append(next(sentences))
        counts.append(len(encode_inside(tokenizer, taken[-1])[0]))
        total += counts[-1]
    starts = length - np.append(np.cumsum(counts[::-1], dtype=np.int64)[::-1], 0)
    first = max(0, int(np.searchsorted(starts, 0, side="right")) - 1)
    return FillerText(taken[first:], np.maximum(starts[first:], 0), sentences.__next__)


def _cuts(offsets: Offsets) -> Iterator[tuple[int, int]]:
    """Cut tokens into parts (first, stop) of up to 64.

    Each part ends with a whole character. A character of more tokens is one part.
    """
    first = 0
    clean = [i for i in range(1, len(offsets)) if offsets[i - 1][1] <= offsets[i][0]]
    for stop, following in zip(clean, [*clean[1:], len(offsets)], strict=False):
        if following - first > _LONGEST:
            yield first, stop
            first = stop
    if offsets:
        yield first, len(offsets)


def _down_from(number: int) -> Iterator[int]:
    while True:
        yield number
        number -= 1
