"""Gather a sequence's keys and values on every context parallel rank."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def chunk_ids(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks that context parallel rank `rank` holds, in order."""
    return rank, 2 * size - 1 - rank


def own_rows(whole: Tensor, rank: int, size: int) -> Tensor:
    """Return the rows of a sequence that a context parallel rank holds."""
    chunks = whole.chunk(2 * size)
    return torch.cat([chunks[chunk] for chunk in chunk_ids(rank, size)])


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
    held = [chunk for rank in range(size) for chunk in chunk_ids(rank, size)]
    return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * size)])


def gather_seen(key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Gather the keys and values that each of this rank's chunks sees.

    Those are the sequence's rows up to the chunk's last; both chunks' share memory. The backward adds their gradients
    where they are packed for their owners; by slices of a gathered sequence, each would be padded to its length first.

    Args:
        key, value: as in `gather_sequence`.
    Returns:
        Keys of both chunks, and values.
    """
    keys_and_values = _Seen.apply(key, value, group)
    return keys_and_values[:2], keys_and_values[2:]


class _Seen(torch.autograd.Function):
    """One collective moves both: its host time is paid once."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes = group, (key.shape, value.shape)
        local = key.new_empty(key.numel() + value.numel())
        for x, part in zip((key, value), local.split([key.numel(), value.numel()]), strict=True):
            part.view(x.shape).copy_(x)
        gathered = local.new_empty(group.size() * len(local))
        torch.distributed.all_gather_into_tensor(gathered, local, group=group)
        ends = [(chunk + 1) * (len(key) // 2) for chunk in chunk_ids(group.rank(), group.size())]
        seen = []
        for part in _views(gathered.view(group.size(), -1), ctx.shapes):
            earlier, later = part.unbind(1)  # chunks of ranks: the first ones ascend, the second ones descend
            whole = torch.cat([*earlier, *reversed(later.unbind())])
            seen += [whole[:end] for end in ends]
        return tuple(seen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *seen: Tensor) -> tuple[Tensor, Tensor, None]:
        size, rank, shapes = ctx.group.size(), ctx.group.rank(), ctx.shapes
        packed = seen[0].new_empty(size, sum(shape.numel() for shape in shapes))
        for part, early, late in zip(_views(packed, shapes), seen[::2], seen[1::2], strict=True):
            first, second = (chunks.unbind() for chunks in part.unbind(1))
            gradients = late.reshape(-1, *part.shape[2:]).unbind()  # of chunks from 0 to this rank's later one
            added = early.reshape(-1, *part.shape[2:]).unbind()  # to the earlier one
            for chunk, one, other in zip(first, gradients, added, strict=False):
                torch.add(one, other, out=chunk)
            for chunk, one in zip((*first[rank + 1 :], *reversed(second)), gradients[rank + 1 :], strict=False):
                chunk.copy_(one)
            for chunk in second[:rank]:
                chunk.zero_()
        local = packed.new_empty(packed.shape[1])
        torch.distributed.reduce_scatter_tensor(local, packed.flatten(), group=ctx.group)
        dkey, dvalue = local.split([shape.numel() for shape in shapes])
        return dkey.view(shapes[0]), dvalue.view(shapes[1]), None


def _views(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """View each rank's keys and its values.

    They are beside each other in `flat`, and become [ranks, chunk, s / 2 cp, …].
    """
    parts = flat.split([shape.numel() for shape in shapes], dim=1)
    return [part.view(-1, 2, shape[0] // 2, *shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
