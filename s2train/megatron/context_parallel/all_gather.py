"""Gather a sequence's keys and values on every context parallel rank."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


def chunk_ids(rank: int, size: int) -> tuple[int, int]:
    """Return the two chunks that context parallel rank `rank` holds, in order."""
    return rank, 2 * size - 1 - rank


def gather_sequence(local: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
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
