"""Draws samples of exact length with needles at chosen depths."""

from dataclasses import dataclass, fields
from itertools import accumulate

import numpy as np

from s2train.data.inside_text import prepends_blank
from s2train.data.tokenizers import Tokenizer
from s2train.errors import ConfigError
from s2train.needles.haystack import FillerText, Haystack, fill_with
from s2train.needles.tasks import Puzzle, Single, Task
from s2train.needles.words import NOISE, Split


@dataclass(frozen=True)
class TaskSample:
    """A haystack with needles, a question and its answer.

    Attributes:
        prompt: int64 [p] token ids: filler with needles, then the question.
        answer: int64 [a] token ids; p + a is the requested length.
        spans: (first token, one past the last) of each needle in `prompt`, in the puzzle's order.
        values: values in the answer: one number, or several numbers or names.
    """

    prompt: np.ndarray
    answer: np.ndarray
    spans: tuple[tuple[int, int], ...]
    values: tuple[str, ...]


class TaskSampler:
    """Draws samples of a task; a sample depends on `rng` alone.

    A sample is composed as text and tokenized as a whole, like a user's prompt. The first tokens of the filler are then
    removed to give it its exact length.

    Args:
        haystack: filler text, cut at ends of sentences.
    Raises:
        ConfigError: the haystack has no words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: str = NOISE, task: Task | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task or Single()
        self._haystack = Haystack(tokenizer, haystack)
        self._first_character = 1 if prepends_blank(tokenizer) else 0  # the tokenizer prepends the first blank itself

    @property
    def remedy(self) -> str:
        """Further remedy for a task that does not fit."""
        names = [entry.name for entry in fields(self.task) if entry.name != "ask"]  # type: ignore[arg-type]
        return f", or fewer {' or '.join(names)}" if names else ""

    def needed_tokens(self, rng: np.random.Generator, split: Split) -> int:
        """Tokens of the sample that `sample` would draw, without filler.

        Counts needles, distractors, question and answer.
        """
        return self._needed(self.task.draft(rng, split))

    def sample(self, rng: np.random.Generator, length: int, depth: float, split: Split) -> TaskSample:
        """Draw a sample of exactly `length` tokens, prompt and answer together.

        Args:
            depth: share of the filler before the first needle (0: it comes first, 1: right before the question), moved
                to the nearest border of sentences. Depths of distractors and other needles are drawn evenly; those of a
                chain are drawn from `depth` on.

        Raises:
            ConfigError: `length` is too small for needles, distractors, question and answer.
        """
        puzzle = self.task.draft(rng, split)
        facts = _facts(puzzle)
        room = length - self._needed(puzzle)
        if room < 0:
            raise self._too_short(length, length - room)
        filler = self._filler(rng, room, puzzle)
        others = rng.random(len(facts) - 1)
        if puzzle.in_order:
            own = len(puzzle.needles) - 1
            others[:own] = depth + (1 - depth) * np.sort(others[:own])
        depths = np.array([depth, *others])
        places = [int(np.abs(filler.borders - d * room).argmin()) for d in depths]
        # At a shared border the first needle is the outermost; the others are sorted by depth.
        depths[0] = depth if puzzle.in_order or depth < 1 else 2.0
        order = sorted(range(len(places)), key=lambda i: (places[i], depths[i], i))
        # Pieces of text: facts by number, sentences by None.
        pieces: list[tuple[str, int | None]] = []
        for border in range(len(filler.sentences) + 1):
            pieces += [(facts[i], i) for i in order if places[i] == border]
            pieces += [(sentence, None) for sentence in filler.sentences[border : border + 1]]
        return self._encode(puzzle, pieces, length, filler, sum(place == 0 for place in places))

    def _encode(
        self, puzzle: Puzzle, pieces: list[tuple[str, int | None]], length: int, filler: FillerText, first: int
    ) -> TaskSample:
        """Encode the pieces and the question, and cut the filler to `length`.

        Args:
            first: index in `pieces` at which one more sentence would be inserted.
        """
        while True:
            texts = [*(text for text, _ in pieces), puzzle.question, puzzle.answer]
            ids, offsets = self.tokenizer.encode_with_offsets("".join(texts)[self._first_character :])
            if len(ids) >= length:
                break
            pieces.insert(first, (filler.more(), None))
        ends = np.array([stop for _, stop in offsets], dtype=np.int64)
        stops = np.array(list(accumulate(map(len, texts)))) - self._first_character
        # A token across two pieces belongs to the later one; one across question and answer belongs to the answer.
        starts = np.searchsorted(ends, np.append(0, stops[:-1]), side="right")
        is_filler = np.zeros(len(ids), dtype=bool)
        spans: dict[int, tuple[int, int]] = {}
        for (_, number), start, stop in zip(pieces, starts[:-2].tolist(), starts[1:-1].tolist(), strict=True):
            if number is None:
                is_filler[start:stop] = True
            else:
                spans[number] = start, stop
        drop = np.flatnonzero(is_filler)[: len(ids) - length]
        if len(drop) < len(ids) - length:
            raise self._too_short(length, len(ids) - int(is_filler.sum()))
        tokens, asked = np.delete(np.array(ids, dtype=np.int64), drop), int(starts[-1]) - len(drop)

        def moved(index: int) -> int:
            return index - int(np.searchsorted(drop, index))

        needles = tuple(
            (moved(start), moved(stop)) for start, stop in map(spans.__getitem__, range(len(puzzle.needles)))
        )
        return TaskSample(tokens[:asked], tokens[asked:], needles, puzzle.values)

    def _needed(self, puzzle: Puzzle) -> int:
        text = "".join([*_facts(puzzle), puzzle.question, puzzle.answer])
        return len(self.tokenizer.encode(text[self._first_character :]))

    def _too_short(self, length: int, needed: int) -> ConfigError:
        problem = f"needles, question and answer alone take {needed} tokens"
        return ConfigError("lengths", length, problem, f"Use {needed} or more" + self.remedy)

    def _filler(self, rng: np.random.Generator, length: int, puzzle: Puzzle) -> FillerText:
        if puzzle.lines is None:
            return self._haystack.draw_text(rng, length)
        return fill_with(self.tokenizer, map("".join, puzzle.lines(rng)), length)


def _facts(puzzle: Puzzle) -> list[str]:
    """Facts of a puzzle as text, needles before distractors."""
    return ["".join(fact) for fact in (*puzzle.needles, *puzzle.distractors)]
