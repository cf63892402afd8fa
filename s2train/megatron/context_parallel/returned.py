"""Order sums of the gradients that come back for sent keys.

Several ranks may return a gradient of the same unit: a block or a token of one KV head, its key and its value. They are
added in rank order, so that every run gives the same bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from s2train.kernels.transfer import to_device


@dataclass(frozen=True, eq=False)
class Returned:
    """Order in which one rank sums returned gradients.

    Units that were sent most often come first. So the second gradients, say, belong to the first units, in order, and
    are added without indices.

    Attributes:
        units: indices of the units that were sent, each once.
        order: places in what comes back: first gradients of all units, then second gradients, and so on; int64.
        counts: number of first, second, … gradients; descending.
    """

    units: tuple[Tensor, ...]
    order: Tensor
    counts: list[int]

    @classmethod
    def of(cls, parts: Sequence[np.ndarray], shape: tuple[int, ...], device: torch.device) -> "Returned":
        """Order the gradients of sent units, in time linear in their number.

        Args:
            parts: units in the order in which they are sent, each a number in an array of `shape`; distinct within a
                part.
        """
        times = np.zeros(math.prod(shape), np.int16)
        before = []
        for part in parts:
            before.append(times[part])
            times[part] += 1
        units = np.flatnonzero(times > 0)
        units = units[np.argsort(-times[units], kind="stable")]  # numpy sorts 16-bit integers by radix
        place = np.empty(times.shape, np.int64)
        place[units] = np.arange(len(units))
        counts = np.bincount(times[units])[:0:-1].cumsum()[::-1]
        first = np.cumsum([0, *counts])
        order = np.empty(first[-1], np.int64)
        order[first[np.concatenate(before)] + place[np.concatenate(parts)]] = np.arange(len(order))
        where = tuple(to_device(index, device) for index in np.unravel_index(units, shape))
        return cls(where, to_device(order, device), counts.tolist())
