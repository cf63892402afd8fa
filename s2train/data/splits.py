"""Divides a dataset's documents into train, held out and test by `data.split`."""

import math
import re
from itertools import accumulate
from typing import Any

import numpy as np

from s2train.errors import ConfigError

_NUMBER = r"\d+(?:\.\d+)?"
_WEIGHTS = re.compile(rf"\s*{_NUMBER}\s*([,/]\s*{_NUMBER}\s*){{0,2}}")
# Quoted for a shell.
EXAMPLE = "Set e.g. 'data.split=[90,10,0]' for train, held out and test (two weights: train and held out; one: train)"


def split_documents_range(split: Any, documents: int) -> tuple[range, range, range]:
    """Compute the documents of train, held out and test.

    They are consecutive ranges, rounded as in Megatron.

    Args:
        split: weights such as "90,10,0", "90/10" or [90, 10, 0]; two are train and held out, one is train.

    Raises:
        ConfigError: on `data.split`; it is not a list of weights, or none is above 0.
    """
    weights = _weights(split)
    total = sum(weights)
    ends = list(accumulate((weight / total for weight in weights), initial=0.0))
    bounds = [round(end * documents) for end in ends]
    train, held_out, test = (range(bounds[i], bounds[i + 1]) for i in range(3))
    return train, held_out, test


def megatron_split(split: Any) -> str:
    """Format a split for Megatron, which reads no exponents: "90,10,0"."""
    return ",".join(np.format_float_positional(weight, trim="-") for weight in _weights(split))


def more_documents(documents: int) -> str:
    """Remedy for a split that leaves a part without documents."""
    if split_documents_range("90,10", documents)[1]:
        return "Set e.g. 'data.split=[90,10]' or evaluation.interval=0 to evaluate nothing"
    cut = "prepare text files with document_chars=10000 (characters) to cut them"
    if documents > 1:
        return f"Set 'data.split=[{documents - 1},1]' to hold one out, or {cut}"
    return f"P{cut[1:]}, or set data.split=100 evaluation.interval=0 to evaluate nothing"


def _weights(split: Any) -> list[float]:
    """Parse a split into three weights."""
    if isinstance(split, str) and _WEIGHTS.fullmatch(split):
        weights = [float(weight) for weight in re.split("[,/]", split)]
    else:
        weights = list(split) if isinstance(split, list | tuple) else [split]
        sound = all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights)
        if not sound or not 1 <= len(weights) <= 3:
            raise ConfigError("data.split", split, "is not a list of up to three weights", EXAMPLE)
    if not any(weights):
        raise ConfigError("data.split", split, "all its weights are 0", EXAMPLE)
    return weights + [0.0] * (3 - len(weights))
