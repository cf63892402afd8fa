"""Turns a dataset into the micro batches of this rank."""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils.data import DataLoader, Dataset, default_collate

from s2train.config import PretrainConfig
from s2train.megatron.compat import slice_batch_for_context_parallel

Batch = dict[str, torch.Tensor]
_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class MicroBatchSampler:
    """Yields dataset indices of this data parallel rank's micro batches.

    Samples run from `start` up to `stop`. A global batch is `global_batch_size` consecutive samples. Micro batch m of
    rank r starts at sample (m · dp + r) · micro_batch_size, so that the samples of a step do not depend on dp.
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
    """Yield the micro batches of samples [start, stop) on `device`.

    Each holds tokens, labels, loss_mask and position_ids, all [b, s / cp]. With `data.attention_within_documents` it
    also holds `documents`, from `document_bounds`: of whole sequences, on the CPU.
    """
    within_documents = cfg.data.attention_within_documents
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
        collate_fn=collate_documents if within_documents else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_group_signals,
        # The default would draw from the run's generator, and a resumed run creates one loader more.
        generator=torch.Generator(),
    )
    cp_group = parallel_state.get_context_parallel_group()
    for item in start_workers(loader):
        batch = {key: item[key].to(device, non_blocking=True) for key in _KEYS}
        batch = slice_batch_for_context_parallel(batch, cp_group)
        if within_documents:
            batch["documents"] = item["documents"]
        yield batch


class EarlyBatches(Iterator[Batch]):
    """Micro batches of an iterator that can be fetched early."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._source = source
        self._fetched: deque[Batch | Exception] = deque()

    def fetch(self, count: int = 1) -> None:
        """Fetch until `count` micro batches wait to be taken.

        An error of the data is raised when the batch is taken.
        """
        while len(self._fetched) < count and not (self._fetched and isinstance(self._fetched[-1], Exception)):
            try:
                self._fetched.append(next(self._source))
            except Exception as error:
                self._fetched.append(error)

    def counted_tokens(self, count: int) -> torch.Tensor:
        """Count the tokens in the loss of the next `count` micro batches.

        Fetches these. Doesn't wait for the GPU. Returns float64 [].
        """
        self.fetch(count)
        masks = [batch["loss_mask"] for batch in islice(self._fetched, count) if not isinstance(batch, Exception)]
        device = torch.cuda.current_device()
        return sum((mask.double().sum() for mask in masks), torch.zeros((), dtype=torch.float64, device=device))

    def __next__(self) -> Batch:
        fetched = self._fetched.popleft() if self._fetched else next(self._source)
        if isinstance(fetched, Exception):
            raise fetched
        return fetched


def start_workers(loader: DataLoader) -> Iterator[Any]:
    """Start a loader's workers with SIGTERM held back.

    It is until `ignore_group_signals` runs in them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # new processes inherit it
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_group_signals(worker: int) -> None:
    """Make a data worker ignore Ctrl-C and its process group's SIGTERM.

    A SIGTERM from its rank still ends it. torchrun and a terminal signal a rank's whole process group, and the rank
    needs its workers to finish the step and save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def collate_documents(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate samples into a micro batch on the CPU, with its `documents`.

    Computing the bounds here avoids a GPU synchronisation.
    """
    batch: dict[str, torch.Tensor] = default_collate(samples)
    return batch | {"documents": document_bounds(batch["position_ids"])}


def document_bounds(position_ids: torch.Tensor) -> torch.Tensor:
    """Bounds of the documents in each sequence: int32 [b, n + 1].

    A row holds the first position of each document, then the sequence length, repeated to fill the row. n is a power
    of two, so that few shapes occur.

    Args:
        position_ids: int64 [b, s], 0 where a document begins and at the start of the sequence.
    """
    batch, length = position_ids.shape
    begins = position_ids == 0
    most = int(begins.sum(1).max())
    bounds = torch.full((batch, (1 << (most - 1).bit_length()) + 1), length, dtype=torch.int32)
    for row, begin in zip(bounds, begins, strict=True):
        first = begin.nonzero().flatten()
        row[: len(first)] = first
    return bounds
