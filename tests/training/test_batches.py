"""Micro batches carry their documents' bounds, load early, and survive signals."""

import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from s2train.training.batches import (
    Batch,
    EarlyBatches,
    collate_documents,
    document_bounds,
    ignore_group_signals,
    start_workers,
)


def test_bounds_are_first_positions_and_then_the_length_repeated() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5]])
    assert document_bounds(positions).tolist() == [[0, 3, 4, 6, 6], [0, 6, 6, 6, 6]]
    assert document_bounds(positions).dtype == torch.int32
    assert document_bounds(torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[0, 1, 2, 3, 3]]


def test_a_single_document_is_the_whole_sequence() -> None:
    assert document_bounds(torch.arange(7)[None]).tolist() == [[0, 7]]


def test_a_micro_batch_carries_the_bounds_of_its_samples() -> None:
    samples = [{"position_ids": torch.tensor([0, 1, 0])}, {"position_ids": torch.tensor([0, 0, 1])}]
    batch = collate_documents(samples)
    assert batch["documents"].tolist() == [[0, 2, 3], [0, 1, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]


def faulty(drawn: list[int]) -> Iterator[Batch]:
    """Three micro batches, which are also counted, and an error."""
    for number in range(3):
        drawn.append(number)
        yield {"tokens": torch.tensor(number)}
    raise OSError("the disk is gone")


def test_batches_fetched_early_keep_their_order() -> None:
    drawn: list[int] = []
    batches, taken = EarlyBatches(faulty(drawn)), []
    for _ in range(2):  # the second is fetched already
        batches.fetch()
    assert drawn == [0]
    for number in range(3):
        taken.append(int(next(batches)["tokens"]))
        if number == 1:
            batches.fetch()
    assert taken == drawn == [0, 1, 2]


def test_an_error_of_a_batch_fetched_early_is_raised_when_it_is_taken() -> None:
    batches = EarlyBatches(faulty([]))
    for _ in range(3):
        next(batches)
    batches.fetch()
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_tokens_that_count_are_counted_before_their_batches_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    masks = [torch.ones(1, 4), torch.zeros(1, 4), torch.eye(1, 4)]
    batches = EarlyBatches({"loss_mask": mask} for mask in masks)
    batches.fetch()
    assert [float(batches.counted_tokens(count)) for count in (2, 3)] == [4, 5]
    assert all(next(batches)["loss_mask"] is mask for mask in masks)


def ignore_later(worker: int) -> None:
    """As on a busy machine."""
    time.sleep(0.5)
    ignore_group_signals(worker)


def test_a_worker_survives_a_signal_of_its_group_before_it_has_begun() -> None:
    batches = start_workers(DataLoader([1, 2], num_workers=1, worker_init_fn=ignore_later))
    worker = batches._workers[0]  # type: ignore[attr-defined]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # from another process than the worker's parent
    assert [int(batch) for batch in batches] == [1, 2]
