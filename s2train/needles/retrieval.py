"""Needle retrieval over length x depth: does greedy decoding give exactly the answer, or text that contains it?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, islice, zip_longest

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from s2train.config import NeedleConfig
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.inference.generation import Decode
from s2train.needles.results import Cell
from s2train.needles.samples import TaskSample, TaskSampler


@dataclass(frozen=True)
class NeedleGrid:
    """What is asked: `trials` samples for each pair of length (tokens) and depth (0: beginning, 1: end).

    Attributes:
        jitter: how far a trial's own depth may be off, at most.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    seed: int
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ConfigError("lengths", list(self.lengths), "no length to evaluate", "Name one or more, in tokens")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("depths", list(self.depths), "not between 0 and 1", "Use e.g. [0,0.25,0.5,0.75,1]")
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if len(set(values)) < len(values):
                raise ConfigError(name, list(values), "names a value twice", "Name each once")
        if not 0 <= self.jitter <= 0.5:
            raise ConfigError("depth_jitter", self.jitter, "not between 0 and 0.5", "Use e.g. 0.05, or 0 for none")
        if self.trials < 1:
            raise ConfigError("trials", self.trials, "no trial in a cell", "Use 1 or more")

    @property
    def cells(self) -> list[tuple[int, float]]:
        """(length, depth) of every cell, short ones first."""
        return [(length, depth) for length in sorted(self.lengths) for depth in self.depths]

    def rng(self, length: int, depth: float, trial: int) -> np.random.Generator:
        """The randomness of one trial, whatever rank runs it and whatever else is in the grid."""
        return np.random.default_rng([self.seed, length, round(depth * 1_000_000), trial])

    def sample(self, sampler: TaskSampler, length: int, depth: float, trial: int) -> TaskSample:
        """The question of one trial."""
        return _sample(self, sampler, length, depth, trial)


@lru_cache(maxsize=32)  # a cell's trials are asked for again by its reach, and long ones take long to tokenize
def _sample(grid: NeedleGrid, sampler: TaskSampler, length: int, depth: float, trial: int) -> TaskSample:
    rng = grid.rng(length, depth, trial)
    offset = grid.jitter * (2 * rng.spawn(1)[0].random() - 1)
    return sampler.sample(rng, length, float(np.clip(depth + offset, 0, 1)), "eval")


@dataclass(frozen=True)
class Ranks:
    """This rank among those that share the trials (data parallel); the default runs all of them here."""

    index: int = 0
    count: int = 1
    group: "dist.ProcessGroup | None" = None


def needed_length(sampler: TaskSampler, grid: NeedleGrid, length: int) -> int:
    """Tokens that needles, distractors, question and answer take in a sample that `grid` asks for at `length`.

    Of the largest one, unless the first takes so little that none comes near `length`.
    """
    rngs = (grid.rng(length, depth, trial) for depth in grid.depths for trial in range(grid.trials))
    needed = (sampler.needed_tokens(rng, "eval") for rng in rngs)
    first = next(needed)
    return first if 2 * first <= length else max(first, *needed, 0)


def choose_grid(cfg: NeedleConfig, trained_length: int, sampler: TaskSampler) -> NeedleGrid:
    """The grid asked for; without lengths, quarters of `trained_length` as far as a needle fits in."""
    lengths = cfg.lengths if cfg.lengths is not None else [trained_length * n // 4 for n in (1, 2, 3, 4)]
    grid = NeedleGrid(tuple(lengths), tuple(cfg.depths), cfg.trials, cfg.seed, cfg.depth_jitter)
    if cfg.lengths is not None:
        return grid
    fitting = tuple(length for length in grid.lengths if needed_length(sampler, grid, length) <= length)
    return replace(grid, lengths=fitting or (trained_length,))


def check_fit(sampler: TaskSampler, grid: NeedleGrid) -> None:
    """Raise ConfigError where the needles do not fit a length of the grid."""
    for length in sorted(grid.lengths):
        needed = needed_length(sampler, grid, length)
        if needed > length:
            raise ConfigError(
                "lengths",
                length,
                f"needles, question and answer take up to {needed} tokens by themselves",
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
    """Every cell of the grid in order, each as soon as it is known, on all ranks alike.

    Trials of a cell are striped over `ranks`, and the counts summed over them. `grid` has passed `check_fit`.

    Args:
        decode: greedy continuation of prompts (`s2train.inference.generation`).
        batch_size: sequences decoded at once, on a rank; fewer, but one at least, where they would have more than
            `batch_tokens`.
        extra_tokens: decoded after as many as the answer has, for whether the text contains the answer's values.
        finished: cells known already, by (length, depth); taken as they are. The same on all ranks.
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
    """Batches of equally long prompts: a tokenizer may cut one value into more tokens than another."""

    def answer_length(sample: TaskSample) -> int:
        return len(sample.answer)

    for _, group in groupby(sorted(samples, key=answer_length), key=answer_length):
        while batch := list(islice(group, batch_size)):
            yield batch


def _score(
    decode: Decode, batch: Sequence[TaskSample], tokenizer: Tokenizer, extra_tokens: int, device: torch.device
) -> Tensor:
    """int64 [7]: answers that match exactly; answer tokens that match, of how many; letters and digits likewise; values
    that the text contains likewise, whatever else it says (RULER's string_match_all, in either case)."""
    prompts = torch.from_numpy(np.stack([sample.prompt for sample in batch])).to(device)
    answers = torch.from_numpy(np.stack([sample.answer for sample in batch])).to(device)
    decoded = decode(prompts, answers.shape[1] + extra_tokens)
    given = decoded[:, : answers.shape[1]]
    hits = given == answers
    right = total = found = 0
    for told, asked in zip(given.tolist(), answers.tolist(), strict=True):
        pairs = list(zip_longest(_characters(tokenizer, told), _characters(tokenizer, asked), fillvalue=""))
        right += sum(one == other for one, other in pairs if other.isalnum())
        total += sum(other.isalnum() for _, other in pairs)
    for sample, ids in zip(batch, decoded.tolist(), strict=True):
        text = tokenizer.decode(ids[: ids.index(tokenizer.eod)] if tokenizer.eod in ids else ids).lower()
        found += sum(value.lower() in text for value in sample.values)
    values = sum(len(sample.values) for sample in batch)
    counts = [int(hits.all(dim=1).sum()), int(hits.sum()), hits.numel(), right, total, found, values]
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _characters(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text token by token: bytes that are no text count for one character each, and so does a token without any."""
    return "".join(tokenizer.decode([one]) or "\N{REPLACEMENT CHARACTER}" for one in ids)
