"""Reference decoding in plain torch; also the CPU backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import BlockLayout

_CACHED_ROWS = 8


def reference_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    positions: Tensor,
    layout: BlockLayout | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute output [b, H, d_v] and log-sum-exp [b, H] in plain torch.

    Arguments are those of `block_sparse_decode`, but q may be more precise than keys and values: all arithmetic is in
    q's dtype, and float64 makes this the oracle. The host reads the positions.
    """
    at = positions.tolist()
    batch, num_heads, _ = q.shape
    num_kv_heads, block_size = table.shape[1], keys.shape[1]
    length = max(max(at) + 1, 1)
    k, v = (_tokens(pages, table, length).to(q.dtype) for pages in (keys, values))
    key = torch.arange(length, device=q.device)
    seen = key <= positions[:, None]
    seen &= torch.tensor([p >= 0 for p in at], device=q.device)[:, None]
    keep = seen[:, None].expand(batch, num_heads, length)
    if layout is not None:
        rows = torch.stack([kept_blocks(layout, max(p, 0) // block_size) for p in at])
        keep = keep & rows[:, :, key // block_size]
    stored = (table[..., key // block_size] >= 0).repeat_interleave(num_heads // num_kv_heads, 1)
    keep = keep & stored
    grouped = q.view(batch, num_kv_heads, -1, q.shape[-1])
    scores = (grouped @ k.mT * softmax_scale).view(batch, num_heads, length).masked_fill(~keep, -torch.inf)
    nothing = ~keep.any(-1, keepdim=True)
    peak = scores.amax(-1, keepdim=True).masked_fill(nothing, 0)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True).masked_fill(nothing, 1)
    out = (weights / total).view(batch, num_kv_heads, -1, length) @ v
    lse = (peak + total.log()).masked_fill(nothing, -torch.inf)
    return out.view(batch, num_heads, -1), lse.squeeze(-1)


def _tokens(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Read every sequence's first `length` tokens, as `read_tokens` does.

    No page is written.
    """
    numbers = table[..., : -(-length // pages.shape[1])].long()
    found = pages[numbers.clamp(min=0)].masked_fill((numbers < 0)[..., None, None], 0)
    return found.flatten(2, 3)[:, :, :length]


def kept_blocks(layout: BlockLayout, query_block: int) -> Tensor:
    """Return which key blocks each head keeps for a query block.

    The result is bool [H, n_k]. The most recent results are cached.
    """
    rows = layout.cache.setdefault("decode_rows", {})
    if query_block not in rows:
        num_patterns = (layout.row_offsets.numel() - 1) // layout.num_query_blocks
        kept = torch.zeros(num_patterns, layout.num_key_blocks, dtype=torch.bool, device=layout.device)
        for pattern in range(num_patterns):
            line = pattern * layout.num_query_blocks + query_block
            low, high = layout.row_offsets[line : line + 2].tolist()
            kept[pattern, layout.row_columns[low:high].long()] = True
        if len(rows) >= _CACHED_ROWS:
            del rows[next(iter(rows))]
        rows[query_block] = kept[layout.patterns_of_heads("decoding").long()]
    return rows[query_block]
