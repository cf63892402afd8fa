"""Filler text as tokens, cut between sentences."""

import re
from dataclasses import dataclass

import numpy as np

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError

_LONGEST = 64  # tokens between two cuts


@dataclass(frozen=True)
class Filler:
    """Tokens to hide needles in.

    Attributes:
        tokens: int64 [n].
        borders: int64 [k], rising: where something may be put in; 0 and n are the first and the last.
    """

    tokens: np.ndarray
    borders: np.ndarray


class Haystack:
    """A text whose sentences are tokenized one by one and laid in a ring.

    Args:
        text: cut at ends of sentences, and within those of more than 64 tokens (a list, a language with other stops):
            needles go to the nearest cut, so cuts must lie close. ConfigError if it has no words.
    """

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？])|\n\s*\n", text)]
        encoded = [tokenizer.encode(f" {sentence}") for sentence in sentences if sentence]
        encoded = [ids[at : at + _LONGEST] for ids in encoded for at in range(0, len(ids), _LONGEST)]
        if not encoded:
            raise ConfigError("haystack", repr(text[:20]), "holds no text", "Name a file with sentences")
        self._ring = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self._ends = np.cumsum([len(ids) for ids in encoded])  # index in the ring after each sentence
        self._is_start = np.zeros(len(self._ring), dtype=bool)
        self._is_start[self._ends % len(self._ring)] = True

    def draw(self, rng: np.random.Generator, length: int) -> Filler:
        """`length` tokens in a row that end with a sentence, so that only the first sentence can be cut."""
        stop = int(rng.choice(self._ends))
        index = np.arange(stop - length, stop) % len(self._ring)
        starts = np.flatnonzero(self._is_start[index])
        return Filler(self._ring[index], np.unique(np.concatenate([[0], starts, [length]])))


def fill_with(sentences: list[np.ndarray], length: int) -> Filler:
    """The last `length` tokens of `sentences`, which have as many at least."""
    tokens = np.concatenate([*sentences, np.zeros(0, dtype=np.int64)])
    starts = np.cumsum([0, *map(len, sentences)]) - (len(tokens) - length)
    return Filler(tokens[len(tokens) - length :], np.unique(np.concatenate([[0], starts[starts >= 0], [length]])))
