"""Generates documents of many facts that are repeated later.

Such documents are the densest training for needle retrieval.

    <filler> The magic number of brisk-otter is 4093317. <filler> The magic number of misty-lemon is 7718203.
    <filler> The magic number of brisk-otter is 4093317. <filler> The magic number of misty-lemon is 7718203.<end>

A repeated fact is a question with its answer: its tail is predictable only from the first mention. So one document
trains many look-ups at different distances, in the same tokens as the evaluation's samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import numpy.typing as npt

from s2train.data.inside_text import encode_inside
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.needles.config import NeedleDocumentsConfig
from s2train.needles.haystack import Haystack
from s2train.needles.tasks import Fact, key_value_lines, magic
from s2train.needles.words import ADJECTIVES, NOUNS, split_of

Ids = npt.NDArray[np.int64]

_FACTS_SHARE = 0.97  # share of the filler among the facts if all questions come last
# Needles near depth 0 need training on facts with little before them, which are rare by chance in a long document.
_BEGINS_WITH_FACT = 0.3  # share of documents that begin with a fact
_EARLY = 0.5  # share of the documents with questions last whose facts are log-evenly placed over the filler
_FEW = 50  # values with the same first token: if there are fewer, none is drawn often enough to be memorized
POOL = 1 << 15  # number of values, and of keys of lines, to draw from: far more than a small model can memorize


def recall_facts(task: str, seed: int) -> list[Fact]:
    """Facts from which documents draw heads and tails independently.

    Keys and values are of the training split.

    Args:
        task: recall or recall_lines.
    """
    lines = list(islice(key_value_lines(np.random.default_rng(seed), "train", None), POOL))
    if task == "recall_lines":
        heads = dict(lines)  # each key once
        return [(f" {key}:", f" {value}.") for key, value in heads.items()]
    keys = [key for pair in product(ADJECTIVES, NOUNS) if split_of(key := "-".join(pair)) == "train"]
    return [magic(keys[i % len(keys)], value) for i, (_, value) in enumerate(lines)]


@dataclass(frozen=True)
class Pieces:
    """Concatenated token sequences; the i-th is `tokens[starts[i] : starts[i] + lengths[i]]`.

    All arrays are int64.
    """

    tokens: Ids
    starts: Ids
    lengths: Ids

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> "Pieces":
        """Concatenate token sequences."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        return cls(
            np.concatenate([np.array(s, dtype=np.int64) for s in sequences]), lengths.cumsum() - lengths, lengths
        )

    def joined(self, numbers: Ids) -> Ids:
        """Concatenate the sequences with these numbers: int64 [sum of their lengths]."""
        lengths = self.lengths[numbers]
        before = lengths.cumsum() - lengths
        return self.tokens[np.repeat(self.starts[numbers] - before, lengths) + np.arange(lengths.sum())]


class RecallDocuments:
    """Draws documents of exactly `cfg.length` tokens, including their end.

    Args:
        facts: heads and tails to draw from, such as those of `recall_facts`.

    Raises:
        ConfigError: the length is too small.
    """

    def __init__(self, cfg: NeedleDocumentsConfig, tokenizer: Tokenizer, haystack: str, facts: list[Fact]) -> None:
        self._cfg, self._eod = cfg, tokenizer.eod
        self._haystack = Haystack(tokenizer, haystack)
        heads, tails = (
            [encode_inside(tokenizer, text)[0] for text in dict.fromkeys(part)] for part in zip(*facts, strict=True)
        )
        self._heads = len(heads)
        # Draw tails evenly over their first tokens: numbers with a rare first token would be copied less reliably.
        _, kind, counts = np.unique([tail[0] for tail in tails], return_inverse=True, return_counts=True)
        weights = 1 / np.maximum(counts, _FEW)[kind]
        self._tail_shares = np.cumsum(weights) / weights.sum()
        self._pieces = Pieces.of([*heads, *tails])
        self._longest = max(map(len, heads)) + max(map(len, tails))
        if cfg.length < (least := 2 * self._longest + 1):
            problem = f"a fact, its question and the end of document alone take up to {least} tokens"
            raise ConfigError("needles.length", cfg.length, problem, f"Use {least} or more")

    def document(self, rng: np.random.Generator) -> Ids:
        """Draw one document, int64 [length]."""
        cfg = self._cfg
        room = cfg.length - 1
        most = room // self._longest
        sentences = int(np.clip(round(most * _log_even(rng, cfg.share)), 2, most))
        most = min(sentences // 2, self._heads)
        asks_last = cfg.questions_last > 0 and rng.random() < cfg.questions_last
        facts = most if asks_last else int(np.clip(round(_log_even(rng, cfg.facts)), 1, most))
        order = np.append(np.arange(facts), rng.permutation(facts)) if asks_last else order_facts(rng, sentences, facts)
        heads = rng.permutation(self._heads)[:facts]
        drawn = np.searchsorted(self._tail_shares, rng.random(facts), side="right")
        tails = self._heads + np.minimum(drawn, len(self._tail_shares) - 1)  # the last share may round to below 1
        pieces = np.stack([heads[order], tails[order]], axis=1)
        text = self._pieces.joined(pieces.ravel())
        filler = self._haystack.draw(rng, room - len(text))
        # The last sentence ends the document, like the question of an evaluation's sample.
        places = np.append(rng.choice(filler.borders, len(order) - 1), len(filler.tokens))
        if asks_last:
            late = filler.borders >= _FACTS_SHARE * len(filler.tokens)
            early = filler.borders[~late] if len(filler.tokens) else filler.borders  # the first one is 0
            places[:facts] = rng.choice(early, facts)
            if rng.random() < _EARLY:
                after = np.exp(rng.random(facts) * np.log(len(filler.tokens) + 1)) - 1
                places[:facts] = early[np.searchsorted(early, after, side="right") - 1]
            places[facts:-1] = rng.choice(filler.borders[late], facts - 1)
        if rng.random() < _BEGINS_WITH_FACT:
            places[0] = 0
        places = np.sort(places)
        places = np.repeat(places, self._pieces.lengths[pieces].sum(axis=1))
        return np.append(np.insert(filler.tokens, places, text), self._eod)


def order_facts(rng: np.random.Generator, sentences: int, facts: int) -> Ids:
    """Draw the fact of each sentence: int64 [sentences].

    Facts are numbered in the order of their first mention. A first mention may be any sentence except the last. Every
    other sentence repeats one of the facts mentioned before, drawn evenly.

    Args:
        facts: number of facts, below `sentences`.
    """
    is_first = np.zeros(sentences, dtype=bool)
    is_first[0] = True
    is_first[1 + rng.permutation(sentences - 2)[: facts - 1]] = True
    known = is_first.cumsum()
    return np.where(is_first, known - 1, (rng.random(sentences) * known).astype(np.int64))


def _log_even(rng: np.random.Generator, pair: Sequence[float]) -> float:
    low, high = np.log(pair)
    return float(np.exp(rng.uniform(low, high)))
