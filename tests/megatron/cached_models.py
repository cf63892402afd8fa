"""Layouts of small models that are decoded in tests."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from s2train.layouts.patterns import Dense, LocalVertical, Pattern

BLOCK, VOCABULARY, NUM_BLOCKS = 16, 96, 6


@dataclass(frozen=True)
class Scattered:
    """Keeps the diagonal and blocks without any order: what is dropped may be taken up again."""

    seed: int

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        mixed = (query * 7919 + key * 104729 + self.seed * 15485863) % 1009
        return (query == key) | ((query > key) & (mixed < 400))

    def describe(self) -> str:
        return "scattered"


def vertical(offset: int, sinks: int = 0) -> LocalVertical:
    return LocalVertical(1, 3, offset, sinks)


# Models in which half of a head's dimensions turn.
HALF_TURNED = ("sinks", "mqa")
# Heads of each layer, and how many KV heads they share.
MODELS: dict[str, tuple[list[Sequence[Pattern]], int]] = {
    "dense": ([[Dense()] * 4] * 2, 2),
    "sparse": ([[vertical(h) for h in range(4)]] * 2, 4),
    "sinks": ([[vertical(h, sinks=2) for h in range(4)]] * 2, 4),
    "hybrid": ([[Dense()] * 4, [vertical(h // 2) for h in range(4)]] * 2, 2),
    "a dense head": ([[Dense(), *(vertical(h) for h in range(3))]] * 2, 4),
    "different heads in a group": ([[vertical(h) for h in range(4)], [vertical(h + 1) for h in range(4)]], 2),
    "mqa": ([[vertical(h) for h in range(4)]] * 2, 1),
    "scattered": ([[Scattered(h) for h in range(4)], [Scattered(h + 4) for h in range(4)]], 2),
}
