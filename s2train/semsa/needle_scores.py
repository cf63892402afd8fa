"""Scores needle retrieval under masks, with one forward pass a trial.

Greedy decoding gives the exact answer if and only if each of its tokens is the likeliest after the right earlier ones.
So one pass over prompt and answer shows what decoding would give, without a cache.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.layouts.patterns import Pattern
from s2train.needles.documents import haystack_text
from s2train.needles.retrieval import NeedleGrid, check_fit
from s2train.needles.samples import TaskSampler
from s2train.needles.tasks import find_task
from s2train.semsa.config import FrontierNeedlesConfig
from s2train.semsa.core_attention import set_patterns
from s2train.validation.values import check_seed


@dataclass(frozen=True)
class Trial:
    """A trial of `launch/needle.py`.

    Attributes:
        cell: number of its cell in the grid.
        tokens: int64 [length], prompt and answer.
        asked: tokens of the prompt.
    """

    cell: int
    tokens: Tensor
    asked: int


@dataclass(frozen=True)
class NeedleScore:
    """Exact answers of one cell, over all data parallel ranks."""

    length: int
    depth: float
    correct: int
    trials: int


@dataclass(frozen=True)
class Retrieval:
    """A checked needle evaluation under masks.

    Attributes:
        settings: everything that determines the trials.
    """

    sampler: TaskSampler
    grid: NeedleGrid
    batch_size: int
    settings: dict[str, Any]

    @classmethod
    def read(cls, cfg: FrontierNeedlesConfig, tokenizer: Tokenizer, longest: int) -> "Retrieval | None":
        """Check the settings; None without lengths.

        Args:
            longest: tokens of the profile, up to which its rules are measured.
        Raises:
            ConfigError: a setting can't work, or the needles don't fit a length.
        """
        if cfg.lengths is None:
            return None
        with _under_needles():
            check_seed(cfg.seed)
            if cfg.batch_size < 1:
                raise ConfigError("batch_size", cfg.batch_size, "a batch needs a document", "Set 1 or more")
            grid = NeedleGrid(tuple(cfg.lengths), tuple(cfg.depths), cfg.trials, cfg.seed, cfg.depth_jitter)
            if max(grid.lengths) > longest:
                problem = f"the profile has {longest:,} tokens, and no layout is chosen for more"
                raise ConfigError("lengths", max(grid.lengths), problem, f"Set up to {longest}")
            task = find_task(cfg.task, {})
        haystack = haystack_text(cfg.haystack)
        sampler = TaskSampler(tokenizer, haystack, task)
        with _under_needles():
            check_fit(sampler, grid)
        settings = {name: value for name, value in asdict(cfg).items() if name != "batch_size"}
        settings |= {
            "tokenizer": tokenizer.fingerprint,
            "haystack_text": hashlib.sha256(haystack.encode()).hexdigest()[:16],
        }
        return cls(sampler, grid, cfg.batch_size, settings)

    def trials(self, rank: int = 0, ranks: int = 1) -> list[Trial]:
        """Draw this rank's share of all trials."""
        found = []
        for number, (length, depth) in enumerate(self.grid.cells):
            for trial in range(rank, self.grid.trials, ranks):
                sample = self.grid.sample(self.sampler, length, depth, trial)
                tokens = torch.from_numpy(np.concatenate([sample.prompt, sample.answer]))
                found.append(Trial(number, tokens, len(sample.prompt)))
        return found

    def score(
        self,
        model: torch.nn.Module,
        layers: Sequence[Sequence[Pattern]] | None,
        trials: Sequence[Trial],
        device: torch.device,
    ) -> list[NeedleScore]:
        """Count the exact answers with each head's pattern; collective.

        Args:
            trials: this rank's.
        """
        cells = self.grid.cells
        correct = torch.zeros(len(cells), dtype=torch.int64, device=device)
        for length, own in groupby(trials, key=lambda trial: len(trial.tokens)):
            set_patterns(model, layers, length)
            for batch in _batches(list(own), self.batch_size):
                number = torch.tensor([trial.cell for trial in batch], device=device)
                correct.index_add_(0, number, exact_answers(model, batch, device).long())
        set_patterns(model, None, self.grid.lengths[0])
        torch.distributed.all_reduce(correct, group=parallel_state.get_data_parallel_group())
        return [
            NeedleScore(*cell, right, self.grid.trials) for cell, right in zip(cells, correct.tolist(), strict=True)
        ]


@torch.no_grad()
def exact_answers(model: torch.nn.Module, trials: Sequence[Trial], device: torch.device) -> Tensor:
    """Tell which trials greedy decoding would answer exactly, bool [b].

    Args:
        trials: b trials of the same length.
    """
    tokens = torch.stack([trial.tokens for trial in trials]).to(device)
    asked = torch.tensor([trial.asked for trial in trials], device=device)
    positions = torch.arange(tokens.shape[1], device=device)
    following = model(tokens, positions.expand_as(tokens), None).argmax(-1)[:, :-1]
    is_prompt = positions[1:] < asked[:, None]
    return ((following == tokens[:, 1:]) | is_prompt).all(-1)


def needle_row(scores: Sequence[NeedleScore]) -> dict[str, Any]:
    """Return a row's entries: the sums, and each cell."""
    return {
        "needle_correct": sum(score.correct for score in scores),
        "needle_trials": sum(score.trials for score in scores),
        "needle_cells": [asdict(score) for score in scores],
    }


def _batches(trials: Sequence[Trial], size: int) -> Iterator[Sequence[Trial]]:
    return (trials[first : first + size] for first in range(0, len(trials), size))


@contextmanager
def _under_needles() -> Iterator[None]:
    """Name settings as they are typed here: `needles.lengths` for `lengths`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"needles.{error.setting}", error.value, error.problem, error.remedy) from error
