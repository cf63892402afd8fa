"""Counts samples of steps, with or without Megatron's batch-size ramp-up."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from s2train.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """Steps of one global batch size.

    Attributes:
        batch: sequences.
        steps: number of steps.
    """

    batch: int
    steps: int

    @property
    def samples(self) -> int:
        return self.batch * self.steps


def batch_size(train: TrainConfig, consumed: int) -> int:
    """Return the global batch size of the step after `consumed` samples."""
    if train.rampup_batch_size is None or consumed > train.rampup_batch_size[2]:
        return train.global_batch_size
    # slow to import, and most runs have no ramp-up
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    first, increment, samples = train.rampup_batch_size
    # rank 1, as rank 0 would log
    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        train.global_batch_size, 1, 1, False, 1, first, increment, samples
    )
    calculator.update(consumed, consistency_check=False)
    return int(calculator.get_current_global_batch_size())


def stages(train: TrainConfig, steps: int, consumed: int = 0) -> list[Stage]:
    """Group the next `steps` steps after `consumed` samples by their batch size."""
    return [Stage(batch, len(list(group))) for batch, group in groupby(_batches(train, steps, consumed))]


def samples_of(train: TrainConfig, steps: int, consumed: int = 0) -> int:
    """Return how many samples the next `steps` steps take.

    The steps begin after `consumed` samples.
    """
    if train.rampup_batch_size is None:
        return steps * train.global_batch_size
    return sum(stage.samples for stage in stages(train, steps, consumed))


def _batches(train: TrainConfig, steps: int, consumed: int) -> Iterator[int]:
    for _ in range(steps):
        yield (batch := batch_size(train, consumed))
        consumed += batch
