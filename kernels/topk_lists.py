"""Sort top-k lists into kept blocks by row and by column.

Only torch operators are used, and the host never waits. Result tensors have room for every slot of every list; the
offsets give the part in use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kept_rows(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Return each row's key blocks, ascending and without duplicates.

    Args:
        indices: int32 [..., n_q, k], -1 where a slot is unused.

    Returns:
        Offsets [lists * n_q + 1] and columns [slots of all lists], int32.
    """
    column, kept = _sorted(indices, num_key_blocks)
    offsets = F.pad(kept.sum(-1).flatten().cumsum(0), (1, 0))
    kept = kept.flatten()
    # unused slots and duplicates go to one extra entry, which is cut off
    place = torch.where(kept, kept.cumsum(0) - 1, kept.numel())
    columns = torch.full((kept.numel() + 1,), -1, dtype=torch.int32, device=indices.device)
    return offsets.to(torch.int32), columns.scatter_(0, place, column.flatten())[:-1]


def kept_columns(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Return each key block's query blocks, ascending.

    Returns:
        Offsets [lists * n_k + 1] and rows [slots of all lists], int32.
    """
    column, kept = _sorted(indices, num_key_blocks)
    *_, n_q, k = indices.shape
    number = torch.arange(kept.numel(), device=indices.device).view(kept.shape)
    end = kept.numel() // (n_q * k) * num_key_blocks
    line = torch.where(kept, number // (n_q * k) * num_key_blocks + column, end).flatten()
    # a stable sort: within a column, slots stay in the order of their rows
    line, slot = line.sort(stable=True)
    offsets = torch.searchsorted(line, torch.arange(end + 1, device=indices.device), out_int32=True)
    return offsets, (slot // k % n_q).to(torch.int32)


def _sorted(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Sort each list's key blocks, unused slots last, and mark first occurrences."""
    column = torch.where(indices < 0, num_key_blocks, indices).sort(-1).values
    kept = column < num_key_blocks
    kept[..., 1:] &= column[..., 1:] != column[..., :-1]
    return column, kept
