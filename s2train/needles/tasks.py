"""Needle tasks after RULER (Hsieh et al., 2024, arXiv:2404.06654), with short texts.

    single              The magic number of brisk-otter is 4093317. … The magic number of brisk-otter is| 4093317.
    multi, ask=one      four such needles, asked for one
    multi, ask=all      … The magic numbers of brisk-otter, calm-lion are| 4093317, 7310042.
    key_value           brisk-otter-417: 4093317. … brisk-otter-417:| 4093317.       among many such lines
    variable_tracking   XKQ = 4093317. … PLM = XKQ. … Names of 4093317:| XKQ, PLM.   ask=all; ask=one: PLM stands for| …

A task is one class and one entry of `TASKS`; its fields are its settings. Each key, value and name belongs to one split
by its hash, also in distractors: what evaluation asks for never occurs in training. For the key of a line, the words
before the number determine the split; they are a key of the other tasks.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from s2train.errors import ConfigError
from s2train.needles.words import ADJECTIVES, NOUNS, Split, draw_pair, split_of

Fact = tuple[str, str]  # head and tail of a sentence: a question and its answer

ASK = ("one", "all")
_MOST_NEEDLES = 100  # the evaluation's keys are a few hundred
_CONSONANTS = np.array(list("BCDFGHJKLMNPQRSTVWXZ"))  # so that no name is a word of the haystack
_BATCH = 256  # lines drawn together, since drawing one by one is slow


@dataclass(frozen=True)
class Puzzle:
    """Needles, question and answer of one sample.

    Attributes:
        needles: facts that determine the answer; the first one is placed at the requested depth.
        question, answer: the end of the sample.
        distractors: facts placed anywhere that don't help with the answer.
        in_order: whether the other needles come after the first one, in order; otherwise they are placed anywhere.
        lines: generates endless lines that replace the haystack's text; None: the haystack's text.
    """

    needles: tuple[Fact, ...]
    question: str
    answer: str
    distractors: tuple[Fact, ...] = ()
    in_order: bool = False
    lines: Callable[[np.random.Generator], Iterator[Fact]] | None = field(default=None, compare=False)

    @property
    def values(self) -> tuple[str, ...]:
        """Values that the answer lists."""
        return tuple(self.answer.strip(" .").split(", "))


class Task(Protocol):
    """A kind of puzzle."""

    def draft(self, rng: np.random.Generator, split: Split) -> Puzzle:
        """Draw a puzzle whose keys, values and names are all of `split`."""


@dataclass(frozen=True)
class Single:
    """One needle: a key and its value."""

    def draft(self, rng: np.random.Generator, split: Split) -> Puzzle:
        key, value = draw_pair(rng, split)
        return Puzzle((magic(key, value),), magic(key, value)[0], f" {value}.")


@dataclass(frozen=True)
class Multi:
    """Several needles; asks for the value of one or all."""

    needles: int = 4
    ask: str = "one"

    def __post_init__(self) -> None:
        _check_number("needles", self.needles, 1, _MOST_NEEDLES)
        _check_ask(self.ask)

    def draft(self, rng: np.random.Generator, split: Split) -> Puzzle:
        pairs: dict[str, str] = {}
        while len(pairs) < self.needles:
            key, value = draw_pair(rng, split)
            pairs.setdefault(key, value)
        facts = tuple(magic(key, value) for key, value in pairs.items())
        if self.ask == "one":
            key, value = next(iter(pairs.items()))
            return Puzzle(facts[:1], facts[0][0], f" {value}.", distractors=facts[1:])
        return Puzzle(facts, f" The magic numbers of {', '.join(pairs)} are", f" {', '.join(pairs.values())}.")


@dataclass(frozen=True)
class KeyValue:
    """One line among `distractors` lines of the same kind.

    With None, the haystack consists of such lines only.
    """

    distractors: int | None = None

    def __post_init__(self) -> None:
        if self.distractors is not None:
            _check_number("distractors", self.distractors, 0, 1_000_000)

    def draft(self, rng: np.random.Generator, split: Split) -> Puzzle:
        key, value = next(key_value_lines(rng, split, None))

        def others(rng: np.random.Generator) -> Iterator[Fact]:
            return ((f" {name}:", f" {number}.") for name, number in key_value_lines(rng, split, key))

        needles = ((f" {key}:", f" {value}."),)
        if self.distractors is None:
            return Puzzle(needles, *needles[0], lines=others)
        lines = others(rng)
        return Puzzle(needles, *needles[0], distractors=tuple(next(lines) for _ in range(self.distractors)))


@dataclass(frozen=True)
class VariableTracking:
    """A chain X1 = digits, X2 = X1, … among other chains.

    The chain has `hops` + 1 names; there are `chains` - 1 other chains. The question asks for all names of the value,
    like RULER, or for the value of the chain's last name.
    """

    hops: int = 4
    chains: int = 1
    ask: str = "all"

    def __post_init__(self) -> None:
        _check_number("hops", self.hops, 1, _MOST_NEEDLES)
        _check_number("chains", self.chains, 1, _MOST_NEEDLES // (self.hops + 1) or 1)
        _check_ask(self.ask)

    def draft(self, rng: np.random.Generator, split: Split) -> Puzzle:
        drawn: dict[str, None] = {}
        while len(drawn) < self.chains * (self.hops + 1):
            name = "".join(rng.choice(_CONSONANTS, 3))
            if split_of(name) == split:
                drawn[name] = None
        names = list(drawn)
        values = [draw_pair(rng, split)[1] for _ in range(self.chains)]
        facts: list[list[Fact]] = []
        for number, value in enumerate(values):
            own = names[number * (self.hops + 1) :][: self.hops + 1]
            facts.append([(f" {name} =", f" {known}.") for name, known in zip(own, [value, *own], strict=False)])
        chain = names[: self.hops + 1]
        question, answer = (
            (f" Names of {values[0]}:", f" {', '.join(chain)}.")
            if self.ask == "all"
            else (f" {chain[-1]} stands for", f" {values[0]}.")
        )
        others = tuple(fact for other in facts[1:] for fact in other)
        return Puzzle(tuple(facts[0]), question, answer, distractors=others, in_order=True)


TASKS: dict[str, type[Task]] = {
    "single": Single,
    "multi": Multi,
    "key_value": KeyValue,
    "variable_tracking": VariableTracking,
}


def find_task(name: str, settings: Mapping[str, Any]) -> Task:
    """Create the task `name`; a setting of None takes its default.

    Raises:
        ConfigError: there is no such task, it has no such setting, or a setting can't work.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1, cutoff=0.0)[0]
        raise ConfigError("task", name, "no such task", f"Did you mean {near}? There are {', '.join(TASKS)}")
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if not has_setting(name, key):
            having = [other for other in TASKS if has_setting(other, key)]
            remedy = f"Leave it unset, or set task={' or '.join(having)}" if having else "Leave it unset"
            raise ConfigError(key, value, f"task={name} has no such setting", remedy)
    return TASKS[name](**given)


def has_setting(task: str, setting: str) -> bool:
    """Whether the task exists and has such a setting."""
    return task in TASKS and setting in (entry.name for entry in fields(TASKS[task]))  # type: ignore[arg-type]


def magic(key: str, value: str) -> Fact:
    """Needle of `single` and `multi`; its head is also the question."""
    return f" The magic number of {key} is", f" {value}."


def key_value_lines(rng: np.random.Generator, split: Split, other_than: str | None) -> Iterator[tuple[str, str]]:
    """Yield endless keys, such as ``brisk-otter-417``, and values.

    Args:
        other_than: a key to leave out.
    """
    while True:
        adjective, noun = (rng.integers(len(words), size=_BATCH).tolist() for words in (ADJECTIVES, NOUNS))
        number = rng.integers(100, 1000, size=_BATCH).tolist()
        pairs = (f"{ADJECTIVES[a]}-{NOUNS[n]}" for a, n in zip(adjective, noun, strict=True))
        keys = (f"{pair}-{i}" for pair, i in zip(pairs, number, strict=True) if split_of(pair) == split)
        values = map(str, rng.integers(1_000_000, 10_000_000, size=_BATCH).tolist())
        good_keys = [key for key in keys if key != other_than]
        yield from zip(good_keys, (value for value in values if split_of(value) == split), strict=False)


def _check_number(setting: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(setting, value, f"is not between {least} and {most}", f"Use {least} to {most}")


def _check_ask(ask: str) -> None:
    if ask not in ASK:
        raise ConfigError("ask", ask, "is neither one nor all", "Set one or all")
