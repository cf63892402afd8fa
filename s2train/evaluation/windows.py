"""Cuts documents into the sequences that a model sees at once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A part of a document.

    Attributes:
        tokens: int64 [n], what the model sees.
        targets: int64 [n], the token after each.
        first: targets from this one on are counted; those before were counted in an earlier window.
    """

    tokens: Ids
    targets: Ids
    first: int = 0


def cut(ids: Ids, length: int, stride: int) -> Iterator[Window]:
    """Cut a document into windows that count its tokens once.

    Together they count each token but the first, which nothing predicts.

    Args:
        length: most tokens that the model sees.
        stride: tokens from one window to the next, at most `length`; `length`: windows that don't overlap.
    """
    last, counted = len(ids) - 1, 0
    for start in range(0, last, stride):
        stop = min(start + length, last)
        yield Window(ids[start:stop], ids[start + 1 : stop + 1], counted - start)
        counted = stop
        if stop == last:
            return


def batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """Group windows of similar lengths, the longest first."""
    ordered = sorted(windows, key=lambda window: -len(window.tokens))
    yield from (ordered[first : first + size] for first in range(0, len(ordered), size))
