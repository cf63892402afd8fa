"""Samples of a task at an exact length in tokens, its needles at chosen depths."""

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
    """One question in its haystack.

    Attributes:
        prompt: int64 [p] token ids: filler with the needles in it, question.
        answer: int64 [a] token ids; p + a is the length asked for.
        spans: of each needle in `prompt`, in the puzzle's order: first token, one past the last.
        values: what the answer names: one number, or several numbers or names.
    """

    prompt: np.ndarray
    answer: np.ndarray
    spans: tuple[tuple[int, int], ...]
    values: tuple[str, ...]


class TaskSampler:
    """Draws samples of a task. A sample's draws follow from `rng` alone.

    A sample is composed as text and tokenized in one piece, as a reader's prompt would be; the first tokens of the
    filler are then left out, so that it has its exact length.

    Args:
        haystack: filler text, cut at ends of sentences; ConfigError if it has no words.
    """

    def __init__(self, tokenizer: Tokenizer, haystack: str = NOISE, task: Task | None = None) -> None:
        self.tokenizer, self.task = tokenizer, task or Single()
        self._haystack = Haystack(tokenizer, haystack)
        self._first_character = 1 if prepends_blank(tokenizer) else 0  # the tokenizer's own blank is the sample's

    @property
    def remedy(self) -> str:
        """What to do, beside using longer samples, where the task does not fit a length."""
        names = [entry.name for entry in fields(self.task) if entry.name != "ask"]  # type: ignore[arg-type]
        return f", or fewer {' or '.join(names)}" if names else ""

    def needed_tokens(self, rng: np.random.Generator, split: Split) -> int:
        """Length without any filler of what `sample` would draw: needles, distractors, question and answer."""
        return self._needed(self.task.draft(rng, split))

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
        # At one border the needle that was placed is the outermost, others stand by their depth.
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
        """Tokens of the pieces and the question, with the filler cut to `length`.

        Args:
            first: where in `pieces` a sentence more would go.
        """
        while True:
            texts = [*(text for text, _ in pieces), puzzle.question, puzzle.answer]
            ids, offsets = self.tokenizer.encode_with_offsets("".join(texts)[self._first_character :])
            if len(ids) >= length:
                break
            pieces.insert(first, (filler.more(), None))
        ends = np.array([stop for _, stop in offsets], dtype=np.int64)
        stops = np.array(list(accumulate(map(len, texts)))) - self._first_character
        # A token of two pieces belongs to the later one; one of the question and the answer is to be answered.
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
        problem = f"needles, question and answer take {needed} tokens by themselves"
        return ConfigError("lengths", length, problem, f"Use {needed} or more" + self.remedy)

    def _filler(self, rng: np.random.Generator, length: int, puzzle: Puzzle) -> FillerText:
        if puzzle.lines is None:
            return self._haystack.draw_text(rng, length)
        return fill_with(self.tokenizer, map("".join, puzzle.lines(rng)), length)


def _facts(puzzle: Puzzle) -> list[str]:
    """Needles before distractors."""
    return ["".join(fact) for fact in (*puzzle.needles, *puzzle.distractors)]
