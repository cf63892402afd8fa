"""Builds the attention function of each context parallel exchange mode."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.layout import BlockLayout
from s2train.megatron.context_parallel.attention import attend_after_exchange, attend_gathered, attend_overlapped


def exchange_modes(
    layout: BlockLayout, group: torch.distributed.ProcessGroup
) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention functions by value of `parallel.cp_exchange`.

    Each takes a rank's q, k and v, [s / cp, b, …].
    """

    def prefix(query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
        return block_sparse_attention(query, key, value, layout, query_offset=query_offset)

    return {
        "gather": partial(attend_gathered, prefix, group=group),
        "blocks": partial(attend_after_exchange, _attend, layout=layout, group=group),
        "overlapped": partial(attend_overlapped, _attend, layout=layout, group=group),
    }


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, query_offset: int, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if return_lse:
        return block_sparse_attention(query, key, value, layout, query_offset=query_offset, return_lse=True)
    return block_sparse_attention(query, key, value, layout, query_offset=query_offset)
