"""Needles in haystacks: filler text that hides one sentence, and a question that only this sentence answers.

    <filler> The magic number of brisk-otter is 4093317. <filler> The magic number of brisk-otter is| 4093317.
             needle, at a chosen depth                            question                          | answer

Keys and values asked for in evaluation never occur in training: each belongs to one split, by its hash.
The filler follows RULER's noise haystack (Hsieh et al., 2024, arXiv:2404.06654), or comes from text files.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError

Split = Literal["train", "eval"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
EVAL_SHARE = 5  # one string in five is kept for evaluation

_ADJECTIVES = """
able amber bold brave brisk calm clever coral crisp daring dusty eager early faint fancy fierce gentle giant
glad golden grand happy hasty hidden humble icy ivory jolly keen kind lively lucky mellow misty modest noble
olive plain proud quick quiet rapid rosy rustic silent silver swift tidy warm witty"""
_NOUNS = """
anchor badger basket beacon bishop bridge candle canyon castle cedar cobra comet copper dragon eagle falcon
feather forest garden glacier hammer harbor hunter island jacket kettle lantern lemon lion marble meadow
mirror monkey orchid otter paddle pepper pilot planet rabbit ribbon river saddle sailor sparrow temple tiger
tunnel valley violin walnut wizard"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def split_of(text: str) -> Split:
    """The split that a key or a value belongs to, the same on every machine."""
    return "eval" if zlib.crc32(text.encode()) % EVAL_SHARE == 0 else "train"


def draw_pair(rng: np.random.Generator, split: Split) -> tuple[str, str]:
    """A key such as ``brisk-otter`` and a value of seven digits, both of `split`."""
    key = value = ""
    while not key or split_of(key) != split:
        key = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    while not value or split_of(value) != split:
        value = str(rng.integers(1_000_000, 10_000_000))
    return key, value


def text_haystack(paths: Sequence[Path]) -> str:
    """The text of `paths` in a row, to hide needles in; ConfigError if one can't be read."""
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            problem = f"can't be read ({error.strerror})"
            raise ConfigError("haystack", path, problem, "Set noise, a UTF-8 text file, or [file, …]") from error
    return "\n".join(texts)


@dataclass(frozen=True)
class NeedleSample:
    """One question in its haystack.

    Attributes:
        prompt: int64 [p] token ids: filler, needle, filler, question.
        answer: int64 [a] token ids; p + a is the length asked for.
        key, value: what the needle says.
        position: index in `prompt` of the needle's first token.
    """

    prompt: np.ndarray
    answer: np.ndarray
    key: str
    value: str
    position: int


class NeedleSampler:
    """Draws samples of an exact token length.

    Sentences of the haystack are tokenized one by one and laid in a ring; a sample's filler is a stretch of
    the ring that ends with a sentence, and the needle goes between two sentences. So only the first sentence
    of a sample can be cut, and the tokens of an answer are those in the needle.

    Args:
        haystack: filler text, cut at ends of sentences; ConfigError if it has no words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: str = NOISE) -> None:
        self.tokenizer = tokenizer
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", haystack)]
        encoded = [tokenizer.encode(f" {sentence}") for sentence in sentences if sentence]
        encoded = [ids for ids in encoded if ids]
        if not encoded:
            raise ConfigError("haystack", repr(haystack[:20]), "holds no text", "Name a file with sentences")
        self._ring = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
        self._ends = np.cumsum([len(ids) for ids in encoded])  # index in the ring after each sentence
        self._is_start = np.zeros(len(self._ring), dtype=bool)
        self._is_start[self._ends % len(self._ring)] = True

    def needed_tokens(self, key: str, value: str) -> int:
        """Length of a sample without any filler: needle, question and answer."""
        question, answer = self._question_and_answer(key, value)
        return 2 * (len(question) + len(answer))

    def sample(self, rng: np.random.Generator, length: int, depth: float, split: Split) -> NeedleSample:
        """A sample of exactly `length` tokens, prompt and answer together.

        Args:
            depth: share of the filler before the needle (0: the needle comes first, 1: right before the
                question), moved to the nearest border of sentences.

        Raises:
            ConfigError: `length` is too small for needle, question and answer.
        """
        key, value = draw_pair(rng, split)
        question, answer = self._question_and_answer(key, value)
        filler_length = length - 2 * (len(question) + len(answer))
        if filler_length < 0:
            raise ConfigError(
                "lengths",
                length,
                f"needle, question and answer take {length - filler_length} tokens by themselves",
                f"Use {length - filler_length} or more",
            )
        stop = int(rng.choice(self._ends))
        ring_index = np.arange(stop - filler_length, stop) % len(self._ring)
        filler = self._ring[ring_index]
        borders = np.concatenate([[0], np.flatnonzero(self._is_start[ring_index]), [filler_length]])
        position = int(borders[np.abs(borders - depth * filler_length).argmin()])
        prompt = np.concatenate([filler[:position], question, answer, filler[position:], question])
        return NeedleSample(prompt, answer, key, value, position)

    def _question_and_answer(self, key: str, value: str) -> tuple[np.ndarray, np.ndarray]:
        question = self.tokenizer.encode(f" The magic number of {key} is")
        answer = self.tokenizer.encode(f" {value}.")
        return np.asarray(question, dtype=np.int64), np.asarray(answer, dtype=np.int64)
