"""Completes identifiers whose only definition stands far back.

The prompt ends within the second occurrence of an identifier. Its first occurrence, a definition, stands in the first
30 % of the prompt. The control is the same prompt without the line of the definition, and as much more text before it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt
import torch

from s2train.inference.generation import Decode
from s2train.needles.scores import Score
from s2train.probes.definitions import is_definition, line_span
from s2train.probes.documents import Document, Occurrence

NEAREST = 0.7  # of the length: the least distance of the definition from the end
_LEAST_ANSWER = 2  # tokens to complete
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Completion:
    """One identifier to complete.

    Attributes:
        prompt, control: int64 [n], of equal length; `control` lacks the definition.
        answer: int64 [m], the rest of the identifier.
        distance: tokens from the definition to the occurrence to complete.
    """

    name: str
    prompt: Ids
    control: Ids
    answer: Ids
    distance: int


def find_completions(documents: Sequence[Document], length: int, trials: int, seed: int) -> list[Completion]:
    """Choose up to `trials` completions of `length` tokens, prompt and answer together.

    A name occurs once, and so does its completion: no other identifier of the prompt begins like the given part.
    The choice depends on the documents, the length and the seed.
    """
    places = [
        (number, before, here) for number, document in enumerate(documents) for before, here in _pairs(document, length)
    ]
    chosen: dict[str, Completion] = {}
    for index in np.random.default_rng([seed, length]).permutation(len(places)):
        number, before, here = places[index]
        if here.name in chosen:
            continue
        made = _completion(documents[number], before, here, length)
        if made is not None:
            chosen[here.name] = made
        if len(chosen) == trials:
            break
    return list(chosen.values())


def _pairs(document: Document, length: int) -> Iterator[tuple[Occurrence, Occurrence]]:
    """Yield neighbouring occurrences of which the first is a definition.

    Their distance is at least `NEAREST * length` and less than `length`.
    """
    for places in document.occurrences.values():
        for before, here in pairwise(places):
            if NEAREST * length <= here.first - before.first < length and is_definition(
                document.text, before.start, before.stop
            ):
                yield before, here


def _completion(document: Document, before: Occurrence, here: Occurrence, length: int) -> Completion | None:
    """Make the prompt; None if the text doesn't allow it."""
    count = here.last - here.first
    given = -(-count // 2)
    if count - given < _LEAST_ANSWER or document.stops[here.last - 1] != here.stop:
        return None
    line_start, line_stop = line_span(document.text, before.start, before.stop)
    low = min(int(np.searchsorted(document.starts, line_start)), before.first)
    high = max(int(np.searchsorted(document.stops, line_stop, side="right")), before.last)
    begin, cut = here.last - length, here.first + given
    earlier = begin - (high - low)  # where the control begins
    if earlier < 0 or low < begin:
        return None
    characters = slice(int(document.starts[earlier]), here.start)
    known = document.text[characters]
    prefix = document.text[here.start : int(document.stops[cut - 1])]
    names = set(re.findall(rf"(?<!\w){re.escape(prefix)}\w*", known))
    if len(re.findall(rf"(?<!\w){re.escape(here.name)}(?!\w)", known)) != 1 or names != {here.name}:
        return None
    return Completion(
        here.name,
        document.ids[begin:cut],
        np.concatenate([document.ids[earlier:low], document.ids[high:cut]]),
        document.ids[cut : here.last],
        here.first - before.first,
    )


def score(
    decode: Decode, completions: Sequence[Completion], batch_size: int, device: torch.device
) -> tuple[Score, Score]:
    """Count exact completions with the definition, and without it."""
    right = [0, 0]
    for batch in _batches(completions, batch_size):
        answers = np.stack([one.answer for one in batch])
        for kind in (0, 1):
            prompts = np.stack([one.control if kind else one.prompt for one in batch])
            decoded = decode(torch.from_numpy(prompts).to(device), answers.shape[1]).cpu().numpy()
            right[kind] += int((decoded == answers).all(axis=1).sum())
    return Score(right[0], len(completions)), Score(right[1], len(completions))


def _batches(completions: Sequence[Completion], batch_size: int) -> Iterator[list[Completion]]:
    """Batches of prompts and answers of equal lengths."""

    def answer_length(one: Completion) -> int:
        return len(one.answer)

    for _, group in groupby(sorted(completions, key=answer_length), key=answer_length):
        same = list(group)
        yield from (same[at : at + batch_size] for at in range(0, len(same), batch_size))
