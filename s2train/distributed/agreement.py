"""Shares values among all ranks of the job."""

from typing import TypeVar

import torch

T = TypeVar("T")


def max_over_ranks(*values: int) -> list[int]:
    """Return each non-negative number's maximum over all ranks; a collective."""
    box = torch.tensor(values, dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    return [int(value) for value in box.tolist()]


def broadcast_from_rank_0(value: T | None) -> T:
    """Return rank 0's picklable object on all ranks."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device(torch.cuda.current_device()))
    assert box[0] is not None
    return box[0]
