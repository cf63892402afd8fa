"""Evaluates needle retrieval over length × depth.

Counts exact answers, and texts that contain the answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice, zip_longest

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.inference.generation import Decode
from s2train.needles.config import NeedleConfig
from s2train.needles.results import Cell
from s2train.needles.samples import TaskSample, TaskSampler


@dataclass(frozen=True)
class NeedleGrid:
    """Grid of `trials` samples for each length and depth.

    Attributes:
        lengths: tokens.
        depths: 0 is the beginning, 1 the end.
        jitter: maximum deviation of a trial's depth from its cell's.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("lengths", list(self.lengths), "no length to evaluate", "Set one or more, in tokens")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("depths", list(self.depths), "not between 0 and 1", "Use e.g. [0,0.25,0.5,0.75,1]")
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if len(set(values)) < len(values):
                raise ConfigError(name, list(values), "contains a value twice", "Set each value once")
        if not 0 <= self.jitter <= 0.5:
            raise ConfigError("depth_jitter", self.jitter, "not between 0 and 0.5", "Use e.g. 0.05, or 0 for none")
        if self.trials < 1:
            raise ConfigError("trials", self.trials, "no trial in a cell", "Use 1 or more")

    @property
    def cells(self) -> list[tuple[int, float]]:
        """(length, depth) of every cell, shortest first."""
        return [(length, depth) for length in sorted(self.lengths) for depth in self.depths]

    def rng(self, length: int, depth: float, trial: int) -> np.random.Generator:
        """Random generator of one trial.

        It depends neither on the rank nor on the rest of the grid.
        """
        return np.random.default_rng([self.seed, length, round(depth * 1_000_000), trial])

    def sample(self, sampler: TaskSampler, length: int, depth: float, trial: int) -> TaskSample:
        """Sample of one trial."""
        return _sample(self, sampler, length, depth, trial)


@lru_cache(maxsize=32)  # a cell's reach needs its samples again, and long ones are slow to tokenize
def _sample(grid: NeedleGrid, sampler: TaskSampler, length: int, depth: float, trial: int) -> TaskSample:
    rng = grid.rng(length, depth, trial)
    offset = grid.jitter * (2 * rng.spawn(1)[0].random() - 1)
    return sampler.sample(rng, length, float(np.clip(depth + offset, 0, 1)), "eval")


@dataclass(frozen=True)
class Ranks:
    """This rank among the data parallel ranks that share the trials.

    By default, this rank runs all of them.
    """

    index: int = 0
    count: int = 1
    group: "dist.ProcessGroup | None" = None


def needed_length(sampler: TaskSampler, grid: NeedleGrid, length: int) -> int:
    """Tokens that the largest sample at `length` needs without filler.

    If the first sample needs at most half of `length`, returns its tokens, since no other sample comes near `length`.
    """
    rngs = (grid.rng(length, depth, trial) for depth in grid.depths for trial in range(grid.trials))
    needed = (sampler.needed_tokens(rng, "eval") for rng in rngs)
    first = next(needed)
    return first if 2 * first <= length else max(first, *needed, 0)


def choose_grid(cfg: NeedleConfig, trained_length: int, sampler: TaskSampler) -> NeedleGrid:
    """Choose the grid.

    Without lengths, it has the quarters of `trained_length` that fit a needle.
    """
    lengths = cfg.lengths if cfg.lengths is not None else [trained_length * n // 4 for n in (1, 2, 3, 4)]
    grid = NeedleGrid(tuple(lengths), tuple(cfg.depths), cfg.trials, cfg.seed, cfg.depth_jitter)
    if cfg.lengths is not None:
        return grid
    fitting = tuple(length for length in grid.lengths if needed_length(sampler, grid, length) <= length)
    return replace(grid, lengths=fitting or (trained_length,))


def check_fit(sampler: TaskSampler, grid: NeedleGrid) -> None:
    """Check that the needles fit all lengths of the grid.

    Raises:
        ConfigError: they don't fit a length.
    """
    for length in sorted(grid.lengths):
        needed = needed_length(sampler, grid, length)
        if needed > length:
            raise ConfigError(
                "lengths",
                length,
                f"needles, question and answer alone take up to {needed} tokens",
                f"Use {needed} or more" + sampler.remedy,
            )


def evaluate_grid(
    decode: Decode,
    sampler: TaskSampler,
    grid: NeedleGrid,
    *,
    batch_size: int,
    device: torch.device,
    batch_tokens: int | None = None,
    extra_tokens: int = 0,
    ranks: Ranks | None = None,
    finished: Mapping[tuple[int, float], Cell] | None = None,
) -> Iterator[Cell]:
    """Evaluate every cell of the grid in order.

    Yields each cell as soon as it is known. Collective: all ranks yield the same cells. Trials of a cell are striped
    over `ranks`, and their counts are summed.

    Args:
        decode: greedy continuation of prompts (`s2train.inference.generation`).
        grid: a grid that passed `check_fit`.
        batch_size: sequences decoded at once on a rank; fewer if they would exceed `batch_tokens`, but at least one.
        extra_tokens: tokens decoded beyond the answer's length, to check whether the text contains its values.
        finished: known cells by (length, depth), yielded unchanged; the same on all ranks.
    """
    ranks, finished = ranks or Ranks(), finished or {}
    for length, depth in grid.cells:
        if (length, depth) in finished:
            yield finished[length, depth]
            continue
        trials = range(ranks.index, grid.trials, ranks.count)
        samples = [grid.sample(sampler, length, depth, trial) for trial in trials]
        counts = torch.zeros(7, dtype=torch.int64, device=device)
        at_once = batch_size if batch_tokens is None else max(1, min(batch_size, batch_tokens // length))
        for batch in _batches(samples, at_once):
            counts += _score(decode, batch, sampler.tokenizer, extra_tokens, device)
        if ranks.count > 1:
            dist.all_reduce(counts, group=ranks.group)
        correct, right_tokens, tokens, right_characters, characters, found, values = counts.tolist()
        accuracies = right_tokens / tokens, right_characters / characters
        yield Cell(length, depth, correct, grid.trials, *accuracies, values_found=found, values=values)


def _batches(samples: Sequence[TaskSample], batch_size: int) -> Iterator[list[TaskSample]]:
    """Make batches of prompts of equal length.

    Prompts of a cell may differ in length, since a tokenizer may split one value into more tokens than another.
    """

    def answer_length(sample: TaskSample) -> int:
        return len(sample.answer)

    for _, group in groupby(sorted(samples, key=answer_length), key=answer_length):
        while batch := list(islice(group, batch_size)):
            yield batch


def _score(
    decode: Decode, batch: Sequence[TaskSample], tokenizer: Tokenizer, extra_tokens: int, device: torch.device
) -> Tensor:
    """Count correct answers of a batch: int64 [7].

    In order: exact answers; matching answer tokens and their total; correct letters and digits and their total; values
    that the text contains, whatever else it says (RULER's string_match_all, case-insensitive), and their total.
    """
    prompts = torch.from_numpy(np.stack([sample.prompt for sample in batch])).to(device)
    answers = torch.from_numpy(np.stack([sample.answer for sample in batch])).to(device)
    decoded = decode(prompts, answers.shape[1] + extra_tokens)
    given = decoded[:, : answers.shape[1]]
    hits = given == answers
    right = total = found = 0
    for ids, expected in zip(given.tolist(), answers.tolist(), strict=True):
        pairs = list(zip_longest(_characters(tokenizer, ids), _characters(tokenizer, expected), fillvalue=""))
        right += sum(one == other for one, other in pairs if other.isalnum())
        total += sum(other.isalnum() for _, other in pairs)
    for sample, ids in zip(batch, decoded.tolist(), strict=True):
        text = tokenizer.decode(ids[: ids.index(tokenizer.eod)] if tokenizer.eod in ids else ids).lower()
        found += sum(value.lower() in text for value in sample.values)
    values = sum(len(sample.values) for sample in batch)
    counts = [int(hits.all(dim=1).sum()), int(hits.sum()), hits.numel(), right, total, found, values]
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _characters(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decode token by token.

    Bytes that are not text count as one character each, and so does a token without text.
    """
    return "".join(tokenizer.decode([one]) or "\N{REPLACEMENT CHARACTER}" for one in ids)
