"""From datasets to the micro batches of this rank."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset

from s2train.config import PretrainConfig
from s2train.megatron.compat import slice_batch_for_context_parallel

Batch = dict[str, torch.Tensor]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class MicroBatchSampler:
    """Dataset indices of this data parallel rank's micro batches, from sample `start` up to `stop`.

    A global batch is `global_batch_size` samples in a row; micro batch m of rank r takes its `micro_batch_size`
    samples from (m · dp + r) · micro_batch_size on, so that the samples of a step do not depend on dp.
    """

    def __init__(self, start: int, stop: int, micro_batch_size: int, rank: int, world: int) -> None:
        self._starts = range(start + rank * micro_batch_size, stop, micro_batch_size * world)
        self._micro_batch_size = micro_batch_size

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(first, first + self._micro_batch_size)) for first in self._starts)


def micro_batches(
    cfg: PretrainConfig, dataset: Dataset, start: int, stop: int, device: torch.device
) -> Iterator[Batch]:
    """Micro batches of samples [start, stop) on `device`: tokens, labels, loss_mask, position_ids, each [b, s / cp]."""
    sampler = MicroBatchSampler(
        start,
        stop,
        cfg.train.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.data.num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
    )
    cp_group = parallel_state.get_context_parallel_group()
    for item in loader:
        batch = {key: item[key].to(device, non_blocking=True) for key in _KEYS}
        yield slice_batch_for_context_parallel(batch, cp_group)
