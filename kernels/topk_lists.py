"""Kept blocks of top-k lists by rows and by columns, in torch operators alone: the host never waits.

Tensors have room for every slot of every list; offsets tell how much of it is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def kept_rows(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Offsets [lists * n_q + 1] and columns [slots of all lists], int32: each row's key blocks, ascending, once each.

    Args:
        indices: int32 [..., n_q, k], -1 where a slot is unused.
    """
    column, kept = _sorted(indices, num_key_blocks)
    offsets = F.pad(kept.sum(-1).flatten().cumsum(0), (1, 0))
    kept = kept.flatten()
    # the rest goes to a place of its own, which is cut off
    place = torch.where(kept, kept.cumsum(0) - 1, kept.numel())
    columns = torch.full((kept.numel() + 1,), -1, dtype=torch.int32, device=indices.device)
    return offsets.to(torch.int32), columns.scatter_(0, place, column.flatten())[:-1]


def kept_columns(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Offsets [lists * n_k + 1] and rows [slots of all lists], int32: each key block's query blocks, ascending."""
    column, kept = _sorted(indices, num_key_blocks)
    *_, n_q, k = indices.shape
    number = torch.arange(kept.numel(), device=indices.device).view(kept.shape)
    end = kept.numel() // (n_q * k) * num_key_blocks
    line = torch.where(kept, number // (n_q * k) * num_key_blocks + column, end).flatten()
    # stable: within a column, slots stay in the order of their rows
    line, slot = line.sort(stable=True)
    offsets = torch.searchsorted(line, torch.arange(end + 1, device=indices.device), out_int32=True)
    return offsets, (slot // k % n_q).to(torch.int32)


def _sorted(indices: Tensor, num_key_blocks: int) -> tuple[Tensor, Tensor]:
    """Each list's key blocks ascending, unused slots last; and which slots to keep: no block twice."""
    column = torch.where(indices < 0, num_key_blocks, indices).sort(-1).values
    kept = column < num_key_blocks
    kept[..., 1:] &= column[..., 1:] != column[..., :-1]
    return column, kept
