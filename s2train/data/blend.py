"""Parses `data.path` into datasets and their proportions."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from s2train.data.indexed import read_document_lengths
from s2train.errors import ConfigError

BUNDLED, MOCK = "bundled", "mock"
BUNDLED_PREFIX = "runs/data/bundled"  # prefix of the prepared bundled corpus, under the working directory


@dataclass(frozen=True)
class Blend:
    """Datasets and the fraction of samples from each.

    Mock data have no prefixes.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...]  # sum 1

    @property
    def is_mock(self) -> bool:
        return not self.prefixes


def parse_blend(path: Any) -> Blend:
    """Parse `data.path`.

    It is "mock", "bundled", a prefix, [prefix, …], or [weight, prefix, weight, prefix, …]. Without weights, samples are
    drawn in proportion to the datasets' tokens.

    Raises:
        ConfigError: `path` is anything else, or a file whose tokens must be counted is missing or broken.
    """
    prefixes, weights = _parse(path)
    if weights is None:
        many = len(prefixes) > 1
        weights = [int(read_document_lengths(p).sum(dtype=np.int64)) if many else 1 for p in prefixes]
    return Blend(prefixes, tuple(weight / sum(weights) for weight in weights))


def dataset_prefixes(path: Any) -> tuple[str, ...]:
    """List the datasets that `data.path` names, without reading files.

    Mock data have none.

    Raises:
        ConfigError: `path` names no data.
    """
    return _parse(path)[0]


def _parse(path: Any) -> tuple[tuple[str, ...], list[float] | None]:
    """Prefixes, and the weights or None."""
    remedy = "Set a prefix, [prefix, …], [weight, prefix, …], `bundled` or `mock`"
    entries = [path] if isinstance(path, str) else path
    if not isinstance(entries, list | tuple) or not entries:
        raise ConfigError("data.path", path, "names no data", remedy)
    if all(isinstance(entry, str) for entry in entries):
        names, weights = list(entries), None
    else:
        names, weights = list(entries[1::2]), list(entries[0::2])
        paired = len(names) == len(weights) and all(isinstance(name, str) for name in names)
        if not paired or not all(type(weight) in (int, float) and weight > 0 for weight in weights):
            raise ConfigError("data.path", path, "is not a list of pairs of a weight above 0 and a prefix", remedy)
    if names == [MOCK]:
        return (), []
    if MOCK in names:
        raise ConfigError("data.path", path, "mock data can't be blended with other data", remedy)
    return tuple(BUNDLED_PREFIX if name == BUNDLED else name for name in names), weights
