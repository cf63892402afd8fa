"""Extends a dataset by further epochs, each shuffled separately."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import ConcatDataset


class FurtherEpochs(ConcatDataset):
    """Concatenates the epochs that a run began with and further single epochs.

    Args:
        parts: datasets of the same documents and the same split, first to last.
    """

    def __init__(self, parts: Sequence[GPTDataset]) -> None:
        super().__init__(parts)
        # Megatron's BlendedDataset reads these attributes.
        self.index_split = parts[0].index_split
        self.unique_identifiers = {
            "class": type(self).__name__,
            "parts": [part.unique_identifiers for part in parts],
        }


def further_epochs(lengths: npt.NDArray[np.integer], seq_length: int, first_samples: int, wanted_samples: int) -> int:
    """Count the epochs to add so that a dataset holds `wanted_samples`.

    Megatron builds enough whole epochs for the requested samples, and drops the tokens left at the end.

    Args:
        lengths: tokens of each document.
        seq_length: tokens of a sample, which reads one more for its last label.
        first_samples: samples for which the dataset was built.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    first_epochs = max(1, -(-(first_samples * seq_length + 1) // tokens))
    missing = wanted_samples - (first_epochs * tokens - 1) // seq_length
    return max(0, -(-missing // ((tokens - 1) // seq_length)))


def seed_of_epoch(seed: int, number: int) -> int:
    """Derive the seed of a run's `number`-th further epoch.

    `number` counts from 1; the seed has 32 bits.
    """
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
