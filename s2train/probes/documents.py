"""Reads held-out documents as tokens, with the place of every identifier."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from s2train.data.long_texts import SEGMENT
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.preparation.documents import documents_of
from s2train.probes.config import ProbesConfig

SHORTEST = 8  # characters of an identifier: shorter ones are words of any text
_IDENTIFIER = re.compile(rf"\b[A-Za-z_]\w{{{SHORTEST - 1},}}", re.ASCII)


@dataclass(frozen=True)
class Occurrence:
    """An identifier at one place.

    Attributes:
        start, stop: first character, and one past the last.
        first, last: tokens from `first` up to `last` (excluded), the first of which may begin before the identifier.
    """

    name: str
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Document:
    """A text and its tokens.

    Attributes:
        ids: int64 [n].
        starts, stops: int64 [n], first character of each token, and one past its last.
    """

    text: str
    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def of(cls, text: str, tokenizer: Tokenizer) -> "Document":
        """Tokenize a text in parts, so that long texts need little memory.

        Parts are cut at line ends.
        """
        bounds = [0]
        while bounds[-1] < len(text):
            end = min(bounds[-1] + SEGMENT, len(text))
            if end < len(text):
                end = text.rfind("\n", bounds[-1], end) + 1 or end
            bounds.append(end)
        with ThreadPoolExecutor() as pool:  # the tokenizer's library works outside of the interpreter's lock
            parts = list(pool.map(tokenizer.encode_with_offsets, [text[a:b] for a, b in pairwise(bounds)]))
        ids = [np.array(own, dtype=np.int64) for own, _ in parts]
        spans = [
            np.array(offsets, dtype=np.int64).reshape(-1, 2) + begin
            for begin, (_, offsets) in zip(bounds, parts, strict=False)
        ]
        both = np.concatenate(spans)
        return cls(text, np.concatenate(ids), both[:, 0], both[:, 1])

    @cached_property
    def occurrences(self) -> dict[str, list[Occurrence]]:
        """Find the identifiers, by name, in order."""
        found = [(match[0], *match.span()) for match in _IDENTIFIER.finditer(self.text)]
        if not found:
            return {}
        begins = np.array([start for _, start, _ in found])
        ends = np.array([stop for _, _, stop in found])
        first = np.searchsorted(self.starts, begins, side="right") - 1
        last = np.searchsorted(self.stops, ends, side="left") + 1
        by_name: dict[str, list[Occurrence]] = {}
        for index, (name, start, stop) in enumerate(found):
            place = Occurrence(name, start, stop, int(first[index]), min(int(last[index]), len(self.ids)))
            by_name.setdefault(name, []).append(place)
        return by_name


def held_out_documents(cfg: ProbesConfig, tokenizer: Tokenizer) -> list[Document]:
    """Read and tokenize the documents of `cfg.text`.

    Raises:
        ConfigError: the file is missing, can't be read, or holds no text.
    """
    return [Document.of(text, tokenizer) for text in _texts(cfg)]


def _texts(cfg: ProbesConfig) -> Sequence[str]:
    path = Path(cfg.text)
    if not path.is_file():
        raise ConfigError("text", cfg.text, "no such file", "Set held-out.jsonl, which launch/make_corpus.py writes")
    texts = documents_of("text", cfg.text, path, cfg.text_key)
    if not texts:
        raise ConfigError("text", cfg.text, "holds no text", "Set a file with held-out documents")
    return texts
