"""Micro batches carry the bounds of their documents."""

import torch

from s2train.training.batches import collate_documents, document_bounds


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
