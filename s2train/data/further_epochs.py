"""Extends a dataset by further epochs, each shuffled by itself."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import ConcatDataset


class FurtherEpochs(ConcatDataset):
    """Joins datasets: the epochs that a run began with, then single ones.

    Args:
        parts: of the same documents and the same split, first to last.
    """

    def __init__(self, parts: Sequence[GPTDataset]) -> None:
        super().__init__(parts)
        # What Megatron's BlendedDataset asks of the datasets in it.
        self.index_split = parts[0].index_split
        self.unique_identifiers = {
            "class": type(self).__name__,
            "parts": [part.unique_identifiers for part in parts],
        }


def further_epochs(lengths: npt.NDArray[np.integer], seq_length: int, first_samples: int, wanted_samples: int) -> int:
    """Count the epochs to add to a dataset built for `first_samples`, so that it holds `wanted_samples`.

    Megatron builds as many whole epochs as hold the samples asked for, and drops the tokens left at the end.

    Args:
        lengths: tokens of each document.
        seq_length: tokens of a sample, which reads one more for its last label.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    first_epochs = max(1, -(-(first_samples * seq_length + 1) // tokens))
    missing = wanted_samples - (first_epochs * tokens - 1) // seq_length
    return max(0, -(-missing // ((tokens - 1) // seq_length)))


def seed_of_epoch(seed: int, number: int) -> int:
    """Derive the seed of a run's `number`-th further epoch, from 1 on; 32 bits, as NumPy takes."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
