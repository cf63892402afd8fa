"""Measures the loss on the second occurrence of rare identifiers, by distance.

A rare identifier occurs in one document only, and a few times there. The loss on its first occurrence in the sequence
is the baseline: what the model knows without having seen it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2train.needles.scores import Z_95
from s2train.probes.documents import Document, Occurrence

MOST_OCCURRENCES = 16  # in its document, of a rare identifier
EDGES = (0, 64, 256, 1024, 4096, 16384, 65536, 262144)  # tokens

Logits = Callable[[Tensor], Tensor]  # int64 [1, s] -> [1, s, vocabulary]


@dataclass(frozen=True)
class Recurrence:
    """A rare identifier's first two occurrences in a sequence; nats per token.

    Attributes:
        distance: tokens between them.
    """

    distance: int
    first_loss: float
    second_loss: float


@dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
        ids: int64 [s].
        pairs: occurrences as [first, last) tokens of the sequence.
    """

    ids: npt.NDArray[np.int64]
    pairs: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


def choose_sequences(documents: Sequence[Document], length: int, count: int, seed: int) -> list[Passage]:
    """Choose up to `count` sequences that hold a rare identifier twice.

    Each has `length` tokens; none overlap.
    """
    found = [document.occurrences for document in documents]
    documents_with = Counter(name for names in found for name in names)
    places = [
        (number, begin)
        for number, document in enumerate(documents)
        for begin in range(0, len(document.ids) - length + 1, length)
    ]
    rare = [
        [own for name, own in names.items() if documents_with[name] == 1 and 1 < len(own) <= MOST_OCCURRENCES]
        for names in found
    ]
    chosen: list[Passage] = []
    for index in np.random.default_rng([seed, length]).permutation(len(places)):
        number, begin = places[index]
        pairs = tuple(_pairs(rare[number], begin, begin + length))
        if pairs:
            chosen.append(Passage(documents[number].ids[begin : begin + length], pairs))
        if len(chosen) == count:
            break
    return chosen


def _pairs(
    rare: Sequence[Sequence[Occurrence]], begin: int, end: int
) -> Iterable[tuple[tuple[int, int], tuple[int, int]]]:
    for places in rare:
        inside = [one for one in places if begin < one.first and one.last <= end]
        if len(inside) > 1:
            first, second = ((one.first - begin, one.last - begin) for one in inside[:2])
            yield first, second


@torch.no_grad()
def measure(logits: Logits, sequences: Sequence[Passage], device: torch.device) -> list[Recurrence]:
    """Compute the losses on both occurrences of every pair."""
    found = []
    for sequence in sequences:
        ids = torch.from_numpy(sequence.ids).to(device)
        predicted = logits(ids[None])[0]
        spans = [span for pair in sequence.pairs for span in pair]
        positions = torch.cat([torch.arange(first, last, device=device) for first, last in spans])
        losses = torch.nn.functional.cross_entropy(predicted[positions - 1].float(), ids[positions], reduction="none")
        means = [part.mean().item() for part in losses.split([last - first for first, last in spans])]
        for (first, second), own in zip(sequence.pairs, zip(means[::2], means[1::2], strict=True), strict=True):
            found.append(Recurrence(second[0] - first[0], *own))
    return found


def by_distance(found: Sequence[Recurrence]) -> list[dict[str, Any]]:
    """Average losses, with 95 % intervals, by range of distance.

    Ranges that hold no recurrence are left out.
    """
    rows = []
    for low, high in pairwise(EDGES):
        own = [one for one in found if low <= one.distance < high]
        if own:
            row = {"from": low, "to": high, "count": len(own)}
            for name in ("second_loss", "first_loss"):
                row |= _mean(name, [getattr(one, name) for one in own])
            rows.append(row)
    return rows


def _mean(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A mean and its interval; a single value has none."""
    mean = float(np.mean(values))
    half = Z_95 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: mean, f"{name}_interval": None if half is None else [mean - half, mean + half]}
