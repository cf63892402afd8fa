"""Generates training documents for needle retrieval in several processes.

The documents depend only on the seed and the settings.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from s2train.config import NeedleDocumentsConfig
from s2train.data.bundled import bundled_corpus_files
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.needles.recall import Ids, RecallDocuments, recall_facts
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import TASKS, find_task
from s2train.needles.words import NOISE, text_haystack

RECALLS = ("recall", "recall_lines")
_CHUNK = 64  # documents that share a seed and are generated together


class Documents(Protocol):
    """Draws documents of one length."""

    def document(self, rng: np.random.Generator) -> Ids:
        """Draw one document, int64 [length], with its end of document."""


class TaskDocuments:
    """Draws documents of one sample of an evaluation task each.

    Samples are of the training split, with needles at any depth.
    """

    def __init__(self, cfg: NeedleDocumentsConfig, tokenizer: Tokenizer, haystack: str) -> None:
        self._length, self._eod = cfg.length, tokenizer.eod
        self._sampler = TaskSampler(tokenizer, haystack, find_task(cfg.task, {}))

    def document(self, rng: np.random.Generator) -> Ids:
        """Draw one document, int64 [length]."""
        try:
            sample = self._sampler.sample(rng, self._length - 1, float(rng.random()), "train")
        except ConfigError as error:
            problem = f"{error.problem}, and the end of document takes one"
            raise ConfigError("needles.length", self._length, problem, "Use that many or more") from error
        return np.concatenate([sample.prompt, sample.answer, [self._eod]])


def needle_documents(cfg: NeedleDocumentsConfig, tokenizer: Tokenizer, seed: int) -> Iterator[Ids]:
    """Generate `cfg.documents` documents, int64 [length] each.

    A seed gives the same documents with any number of workers.

    Raises:
        ConfigError: a setting can't work.
    """
    _check(cfg)
    haystack = haystack_text(cfg.haystack)
    source: Documents
    if cfg.task in RECALLS:
        source = RecallDocuments(cfg, tokenizer, haystack, recall_facts(cfg.task, seed))
    else:
        source = TaskDocuments(cfg, tokenizer, haystack)
    sizes = [min(_CHUNK, cfg.documents - first) for first in range(0, cfg.documents, _CHUNK)]
    if cfg.workers == 1:
        for number, size in enumerate(sizes):
            yield from _chunk(source, seed, number, size)
        return
    with ProcessPoolExecutor(cfg.workers, get_context("spawn"), _Worker.start, (source,)) as pool:
        ahead = 4 * cfg.workers  # chunks in memory
        for first in range(0, len(sizes), ahead):
            numbers = range(first, min(first + ahead, len(sizes)))
            for documents in pool.map(partial(_Worker.chunk, seed), numbers, [sizes[n] for n in numbers]):
                yield from documents


def _chunk(source: Documents, seed: int, number: int, size: int) -> Ids:
    rng = np.random.default_rng([seed, number])
    return np.stack([source.document(rng) for _ in range(size)])


class _Worker:
    """A worker process that keeps its source.

    Sending it with each chunk would be slow.
    """

    source: Documents

    @classmethod
    def start(cls, source: Documents) -> None:
        cls.source = source

    @classmethod
    def chunk(cls, seed: int, number: int, size: int) -> Ids:
        return _chunk(cls.source, seed, number, size)


def needle_texts(cfg: NeedleDocumentsConfig, seed: int) -> Iterator[str]:
    """Yield texts to train a tokenizer on.

    Facts of every kind, and an equal amount of filler.
    """
    _check(cfg)
    facts = ["".join(fact) for task in RECALLS for fact in recall_facts(task, seed)[:10_000]]
    filler = haystack_text(cfg.haystack)
    yield from facts
    yield from [filler] * max(1, sum(map(len, facts)) // len(filler))


def haystack_text(given: Any) -> str:
    """Read the text that `needles.haystack` names.

    Raises:
        ConfigError: it names no text.
    """
    if given == "noise":
        return NOISE
    if given == "bundled":
        return text_haystack(bundled_corpus_files())
    files = [given] if isinstance(given, str) else given
    if not isinstance(files, list | tuple) or not files or not all(isinstance(file, str) for file in files):
        remedy = "Set noise, bundled, a text file, or [file, …]"
        raise ConfigError("needles.haystack", given, "names no text", remedy)
    return text_haystack([Path(file) for file in files], "needles.haystack")


def _check(cfg: NeedleDocumentsConfig) -> None:
    if cfg.task not in (*RECALLS, *TASKS):
        raise ConfigError("needles.task", cfg.task, "no such task", f"Set one of {', '.join((*RECALLS, *TASKS))}")
    for name in ("documents", "workers"):
        if (count := getattr(cfg, name)) < 1:
            raise ConfigError(f"needles.{name}", count, "is below 1", "Set 1 or more")
    if not 0 <= cfg.questions_last <= 1:
        raise ConfigError("needles.questions_last", cfg.questions_last, "is not between 0 and 1", "Set 0 to 1")
    for name, pair, most in (("share", cfg.share, 1.0), ("facts", cfg.facts, np.inf)):
        if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
            remedy = f"Set a pair [low, high] with 0 < low <= high{' <= 1' if most == 1 else ''}"
            raise ConfigError(f"needles.{name}", pair, "is not a valid range", remedy)
