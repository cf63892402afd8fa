"""How `data.split` divides a dataset's documents into train, held out and test."""

import re
from itertools import accumulate

from s2train.errors import ConfigError

_NUMBER = r"\d+(?:\.\d+)?"


def split_documents_range(split: str, documents: int) -> tuple[range, range, range]:
    """Documents of train, held out and test: consecutive ranges of all documents, as Megatron rounds them.

    Args:
        split: up to three weights, such as "90,10,0".

    Raises ConfigError, on `data.split`, for anything but weights of which one is above 0.
    """
    if not re.fullmatch(rf"{_NUMBER}(,{_NUMBER}){{0,2}}", split):
        raise ConfigError("data.split", split, "is no list of up to three weights", "Set e.g. 90,10,0")
    weights = [float(weight) for weight in split.split(",")]
    total = sum(weights)
    if total == 0:
        raise ConfigError("data.split", split, "all its weights are 0", "Set e.g. 90,10,0")
    weights += [0.0] * (3 - len(weights))
    ends = list(accumulate((weight / total for weight in weights), initial=0.0))
    bounds = [round(end * documents) for end in ends]
    train, held_out, test = (range(bounds[i], bounds[i + 1]) for i in range(3))
    return train, held_out, test
