"""Paged keys and values: needed pages, token reads and writes.

A page holds one key block of one KV head. `keys` [pages + 1, B, d] and `values` [pages + 1, B, d_v] end with a scratch
page that is never read. Number -1 refers to it: it stands for blocks that are not kept, and writes to it are lost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout


def last_uses(layout: BlockLayout, num_kv_heads: int) -> Tensor:
    """Return the last query block that needs each key block.

    The result is int32 [H_kv, n_k] on the CPU, and -1 where no query block needs the key block. A key block is needed
    by a query block at or after it that keeps it in any query head of the KV head's group. A block that is dropped and
    kept again later stays needed in between, because it can't be recomputed. Computed once and kept in
    ``layout.cache``.
    """
    key = ("last_uses", num_kv_heads)
    if key not in layout.cache:
        layout.cache[key] = _last_uses(layout, num_kv_heads)
    return layout.cache[key]


def _last_uses(layout: BlockLayout, num_kv_heads: int) -> Tensor:
    offsets, rows = layout.column_offsets.cpu().long(), layout.column_rows.cpu()
    counts = offsets.diff()
    if rows.numel() == 0:
        return torch.full((num_kv_heads, layout.num_key_blocks), -1, dtype=torch.int32)
    last = torch.where(counts > 0, rows[(offsets[1:] - 1).clamp(min=0)], -1).view(-1, layout.num_key_blocks)
    last = torch.where(last >= torch.arange(layout.num_key_blocks), last, -1)
    of_head = last[layout.patterns_of_heads("a paged cache").cpu().long()]
    return of_head.view(num_kv_heads, -1, layout.num_key_blocks).amax(1).int()


def pages_held(last_use: Tensor, length: int, block_size: int) -> int:
    """Count a sequence's pages after `length` tokens.

    Counts its key blocks that some query at position >= `length` needs.
    """
    num_blocks = -(-length // block_size)
    return int((last_use[..., :num_blocks] >= length // block_size).sum())


def most_pages_held(last_use: Tensor) -> int:
    """Return the maximum number of pages of a sequence at any length.

    Includes the newest block while it is being written. Each head counts at its own peak, since layers store a chunk
    one after another.
    """
    num_blocks = last_use.shape[-1]
    lines = last_use.reshape(-1, num_blocks).long()
    # Block j is held while query blocks j to last[j] are: +1 at j, -1 after last[j].
    change = (lines >= 0).long()
    change = torch.nn.functional.pad(change, (0, 1))
    change.scatter_add_(1, torch.where(lines >= 0, lines + 1, num_blocks), -(lines >= 0).long())
    return int(change.cumsum(1).amax(1).clamp(min=0).sum())


def write_tokens(pages: Tensor, table: Tensor, tokens: Tensor, position: int) -> None:
    """Write tokens [b, H_kv, n, d] to pages, from `position` on.

    All sequences have the same position. `table` int [b, H_kv, n_blocks] holds the pages; tokens of blocks that are not
    kept are dropped.
    """
    block_size, positions = pages.shape[1], torch.arange(position, position + tokens.shape[2], device=tokens.device)
    pages[table[..., positions // block_size].long(), positions % block_size] = tokens


def write_token(pages: Tensor, table: Tensor, token: Tensor, positions: Tensor) -> None:
    """Write one token [b, H_kv, d] per sequence at its position.

    Everything stays on the device. Positions are int [b]; -1 writes nothing.
    """
    block_size = pages.shape[1]
    at = positions.long().clamp(min=0)[:, None]
    page = table.gather(2, (at // block_size)[..., None].expand(*table.shape[:2], 1)).squeeze(2).long()
    pages[page.masked_fill(positions[:, None] < 0, -1), at % block_size] = token


def read_tokens(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Read the first `length` tokens of every sequence: [b, H_kv, length, d].

    Blocks that are not kept read as zero. One pass suffices, because the scratch page, which stands for all dropped
    blocks, is zeroed first.
    """
    numbers = table[..., : -(-length // pages.shape[1])].long()
    pages[-1] = 0
    found = pages.index_select(0, numbers.remainder(len(pages)).flatten())
    return found.view(*numbers.shape[:2], -1, pages.shape[2])[:, :, :length]
