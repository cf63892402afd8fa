"""Samples of a task at an exact length in tokens, its needles at chosen depths."""

from dataclasses import dataclass, fields

import numpy as np

from s2train.data.haystack import Filler, Haystack, fill_with
from s2train.data.needle_tasks import Fact, Puzzle, Single, Task
from s2train.data.needles import NOISE, Split
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError


@dataclass(frozen=True)
class TaskSample:
    """One question in its haystack.

    Attributes:
        prompt: int64 [p] token ids: filler with the needles in it, question.
        answer: int64 [a] token ids; p + a is the length asked for.
        spans: of each needle in `prompt`, in the puzzle's order: first token, one past the last.
    """

    prompt: np.ndarray
    answer: np.ndarray
    spans: tuple[tuple[int, int], ...]


class TaskSampler:
    """Draws samples of a task. A sample's draws follow from `rng` alone.

    Args:
        haystack: filler text, cut at ends of sentences; ConfigError if it has no words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: str = NOISE, task: Task | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task or Single()
        self._haystack = Haystack(tokenizer, haystack)

    @property
    def remedy(self) -> str:
        """What to do, beside using longer samples, where the task does not fit a length."""
        names = [entry.name for entry in fields(self.task) if entry.name != "ask"]  # type: ignore[arg-type]
        return f", or fewer {' or '.join(names)}" if names else ""

    def needed_tokens(self, rng: np.random.Generator, split: Split) -> int:
        """Length without any filler of what `sample` would draw: needles, distractors, question and answer."""
        return _Parts(self.tokenizer, self.task.draft(rng, split)).length

    def sample(self, rng: np.random.Generator, length: int, depth: float, split: Split) -> TaskSample:
        """A sample of exactly `length` tokens, prompt and answer together.

        Args:
            depth: share of the filler before the first needle (0: it comes first, 1: right before the question),
                moved to the nearest border of sentences. Distractors and other needles have depths of their own,
                drawn evenly; those of a chain from `depth` on.

        Raises:
            ConfigError: `length` is too small for needles, distractors, question and answer.
        """
        puzzle = self.task.draft(rng, split)
        parts = _Parts(self.tokenizer, puzzle)
        room = length - parts.length
        if room < 0:
            raise ConfigError(
                "lengths",
                length,
                f"needles, question and answer take {parts.length} tokens by themselves",
                f"Use {parts.length} or more" + self.remedy,
            )
        filler = self._filler(rng, room, puzzle)
        others = rng.random(len(parts.facts) - 1)
        if puzzle.in_order:
            own = len(puzzle.needles) - 1
            others[:own] = depth + (1 - depth) * np.sort(others[:own])
        depths = np.array([depth, *others])
        places = [int(filler.borders[np.abs(filler.borders - d * room).argmin()]) for d in depths]
        # At one border the needle that was placed is the outermost, others stand by their depth.
        depths[0] = depth if puzzle.in_order or depth < 1 else 2.0
        order = sorted(range(len(places)), key=lambda i: (places[i], depths[i], i))
        pieces: list[np.ndarray] = []
        starts, written, taken = [0] * len(places), 0, 0
        for i in order:
            pieces += [filler.tokens[taken : places[i]], parts.facts[i]]
            starts[i] = places[i] + written
            taken, written = places[i], written + len(parts.facts[i])
        prompt = np.concatenate([*pieces, filler.tokens[taken:], parts.question])
        spans = tuple((starts[i], starts[i] + len(parts.facts[i])) for i in range(len(puzzle.needles)))
        return TaskSample(prompt, parts.answer, spans)

    def _filler(self, rng: np.random.Generator, length: int, puzzle: Puzzle) -> Filler:
        if puzzle.lines is None:
            return self._haystack.draw(rng, length)
        lines, sentences, count = puzzle.lines(rng), [], 0
        while count < length:
            sentences.append(_encode_fact(self.tokenizer, next(lines)))
            count += len(sentences[-1])
        return fill_with(sentences, length)


class _Parts:
    """A puzzle in tokens: int64 arrays, needles before distractors."""

    def __init__(self, tokenizer: Tokenizer, puzzle: Puzzle) -> None:
        self.facts = [_encode_fact(tokenizer, fact) for fact in (*puzzle.needles, *puzzle.distractors)]
        self.question, self.answer = _encode(tokenizer, puzzle.question), _encode(tokenizer, puzzle.answer)

    @property
    def length(self) -> int:
        return sum(map(len, self.facts)) + len(self.question) + len(self.answer)


def _encode_fact(tokenizer: Tokenizer, fact: Fact) -> np.ndarray:
    """Head and tail apart, so that a needle's value has the tokens of the answer."""
    return np.concatenate([_encode(tokenizer, part) for part in fact])


def _encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text), dtype=np.int64)
