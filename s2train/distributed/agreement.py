"""Shares values among all ranks of the job."""

from collections.abc import Iterable
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def take_maximum(values: Tensor) -> Tensor:
    """Replace each value by its maximum over all ranks.

    A collective; the host doesn't wait for the GPU. Returns `values`.
    """
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values


def max_over_ranks(*values: int) -> list[int]:
    """Return each non-negative number's maximum over all ranks; a collective."""
    box = take_maximum(torch.tensor(values, dtype=torch.int64, device=torch.cuda.current_device()))
    return [int(value) for value in box.tolist()]


def over_ranks(value: T) -> list[T]:
    """Gather every rank's picklable value, in rank order; a collective."""
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def union_over_ranks(names: Iterable[str]) -> list[str]:
    """Return all ranks' names, each once; a collective.

    Their order is the same on every rank.
    """
    return list(dict.fromkeys(chain.from_iterable(over_ranks(list(names)))))


def broadcast_from_rank_0(value: T | None) -> T:
    """Return rank 0's picklable object on all ranks."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device(torch.cuda.current_device()))
    assert box[0] is not None
    return box[0]
