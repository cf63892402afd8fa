"""Expand a block layout to a token mask, for dense backends."""

import torch
from torch import Tensor

from .topk_layout import Layout


def token_mask(
    layout: Layout,
    s_q: int,
    s_k: int,
    *,
    causal: bool,
    query_offset: int = 0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Build the bool mask of the keys that each query row sees.

    The shape is [H, s_q, s_k], with a leading batch axis if the layout has one. With `cu_seqlens`, positions restart in
    every document and rows see only their own document.
    """
    device = layout.device
    query, key = torch.arange(s_q, device=device) + query_offset, torch.arange(s_k, device=device)
    same_document = None
    if cu_seqlens is not None:
        bounds = cu_seqlens.to(device=device, dtype=torch.int64)
        document = torch.searchsorted(bounds, query, right=True) - 1
        query = key = query - bounds[document]
        same_document = document[:, None] == document[None, :]
    mask = layout.mask()[..., query // layout.block_size, :][..., key // layout.block_size]
    if causal:
        mask &= query[:, None] >= key[None, :]
    if same_document is not None:
        mask &= same_document
    return mask
