"""Gather a sequence's keys and values on every context parallel rank."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def chunk_ids(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks that context parallel rank `rank` holds, in order."""
    return rank, 2 * size - 1 - rank


def held_chunks(size: int) -> list[int]:
    """Return the chunks that all ranks hold, in order of ranks."""
    return [chunk for rank in range(size) for chunk in chunk_ids(rank, size)]


def gather_sequence(local: Tensor, group: ProcessGroup) -> Tensor:
    """Gather all ranks' rows in the order of the sequence.

    Args:
        local: [s / cp, …], this rank's two chunks.
    Returns:
        [s, …]. The backward sums gradients over the ranks and scatters them to their owners.
    """
    size = group.size()
    gathered = gather_from_sequence_parallel_region(local.contiguous(), group=group)
    chunks = gathered.chunk(2 * size)
    held = held_chunks(size)
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def gather_seen(local: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather the rows that each of this rank's chunks sees.

    Those are the sequence's rows up to the chunk's last. Both results share memory. The backward adds their gradients
    where they are packed for their owners; by slices of a gathered sequence, each would be padded to its length first.

    Args:
        local: as in `gather_sequence`.
    """
    earlier, later = _Seen.apply(local, group)
    return earlier, later


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group, rows = group, local.shape[0] // 2
        whole = gather_sequence(local, group)
        return tuple(whole[: (chunk + 1) * rows] for chunk in chunk_ids(group.rank(), group.size()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, earlier: Tensor, later: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        rows = earlier.shape[0] // (ctx.group.rank() + 1)
        packed = later.new_empty(2 * size * rows, *later.shape[1:])
        for part, chunk in zip(packed.split(rows), held_chunks(size), strict=True):
            added = [seen[chunk * rows : (chunk + 1) * rows] for seen in (later, earlier) if len(seen) > chunk * rows]
            if len(added) == 2:
                torch.add(*added, out=part)
            elif added:
                part.copy_(added[0])
            else:
                part.zero_()
        return reduce_scatter_to_sequence_parallel_region(packed, group=ctx.group), None
