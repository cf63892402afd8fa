"""A dataset whose order goes on after its end: epoch after epoch, each shuffled by itself."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset
from torch.utils.data import ConcatDataset


class FurtherEpochs(ConcatDataset):
    """Samples of datasets one after the other: a run's first order, then single epochs.

    Args:
        parts: of the same documents and the same split, in their order.
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
    """Epochs to add to a dataset that Megatron builds for `first_samples`, until it holds `wanted_samples`.

    Megatron builds whole epochs, as many as hold the samples asked for, and drops the tokens left at the end.

    Args:
        lengths: tokens of each document.
        seq_length: tokens of a sample, which reads one more for its last label.
    """
    tokens = int(lengths.sum(dtype=np.int64))
    first_epochs = max(1, -(-(first_samples * seq_length + 1) // tokens))
    missing = wanted_samples - (first_epochs * tokens - 1) // seq_length
    return max(0, -(-missing // ((tokens - 1) // seq_length)))


def seed_of_epoch(seed: int, number: int) -> int:
    """The seed that shuffles a run's `number`-th further epoch (from 1 on), of 32 bits as NumPy takes them."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
