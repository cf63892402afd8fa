"""Compile the kernels of a sparse layer before the first request."""

import torch
from torch import Tensor

from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.decode.op import append_token, block_sparse_decode
from s2train.kernels.layout import BlockLayout

_TILE = 128  # query rows of a program; queries that begin within a tile need another form
_MOST_SPLITS = 128  # parts of a sequence's keys in decoding; each power of two has a form that merges them


def compile_kernels(
    query: Tensor, key: Tensor, value: Tensor, gathered: Tensor, layout: BlockLayout, num_blocks: int, scale: float
) -> None:
    """Run every kernel once in each form that serving needs.

    The tensors have the dtypes and strides of a step's, which kernels are compiled for; results are dropped. It also
    builds what `layout` keeps for the kernels.

    Args:
        query: [tokens, heads, d].
        key, value: [tokens, H, d].
        gathered: keys and values of one sequence in a row, [2, H, positions, d].
        num_blocks: blocks of the longest sequence.
    """
    count = min(len(query), 2)
    for start in (0, 1, _TILE):  # a prompt's beginning, and later chunks
        own = (key[:count], value[:count])
        keys, values = gathered[:, :, : start + count].transpose(1, 2) if start else own
        if len(keys) == start + count:  # not beyond the longest sequence
            block_sparse_attention(
                query[:count, None],
                keys[:, None],
                values[:, None],
                layout,
                softmax_scale=scale,
                query_offset=start,
            )
    num_kv_heads, dim = key.shape[1:]
    pages = torch.zeros(2, layout.block_size, dim, dtype=key.dtype, device=key.device)
    table = torch.zeros(1, num_kv_heads, num_blocks, dtype=torch.int32, device=key.device)
    nowhere = torch.full((1,), -1, dtype=torch.int32, device=key.device)  # reads and writes nothing
    append_token(key[:1], value[:1], pages, pages, table, nowhere)
    for power in range(_MOST_SPLITS.bit_length()):
        block_sparse_decode(query[:1], pages, pages, table, nowhere, layout, softmax_scale=scale, num_splits=1 << power)
