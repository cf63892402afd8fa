"""Plan which key blocks context parallel ranks exchange.

The plan depends only on the layout and is the same on every rank.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.layouts.host_layout import HostLayout
from s2train.layouts.renumber import renumber
from s2train.megatron.context_parallel.returned import Returned

_ALIGNMENT = 128  # tokens: the first query's position is a multiple of it, which suits the kernels


def owners(num_blocks: int, size: int, device: torch.device) -> Tensor:
    """Return the rank that holds each block, int64 [num_blocks].

    Chunks are dealt zig-zag to `size` ranks.
    """
    chunk = torch.arange(num_blocks, device=device) // (num_blocks // (2 * size))
    return torch.minimum(chunk, 2 * size - 1 - chunk)


def needed_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """Return which blocks each rank's queries keep: bool [size, H_kv, key blocks].

    A block counts if any query block of the rank keeps it in any head of the KV head's group. Key blocks after the
    query block don't count, because attention is causal.
    """
    num_blocks = layout.num_query_blocks
    owner = owners(num_blocks, size, layout.device)
    num_patterns = (layout.row_offsets.numel() - 1) // num_blocks
    touched = torch.zeros(num_patterns, size, num_blocks, dtype=torch.bool, device=layout.device)
    for pattern in range(num_patterns):
        query, key = _causal_pairs(layout, pattern)
        touched[pattern, owner[query], key] = True
    of_head = touched[layout.patterns_of_heads("context parallelism").long()]
    return of_head.view(num_kv_heads, -1, size, num_blocks).any(1).transpose(0, 1)


def _causal_pairs(layout: BlockLayout, pattern: int) -> tuple[Tensor, Tensor]:
    """Return the causal pairs of one pattern.

    Returns query and key blocks, int64 [pairs].
    """
    first = pattern * layout.num_query_blocks
    offsets = layout.row_offsets[first : first + layout.num_query_blocks + 1].long()
    blocks = torch.arange(layout.num_query_blocks, device=layout.device)
    begin, end = offsets[[0, -1]].tolist()
    query, key = torch.repeat_interleave(blocks, offsets.diff()), layout.row_columns[begin:end].long()
    causal = key <= query
    return query[causal], key[causal]


def exchanged_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """Count blocks sent between ranks, int64 [source, destination]; 0 to itself.

    A block is `block_size` keys and values of one KV head: batch · block_size · (d + d_v) elements. The forward pass
    sends it once; the backward pass sends the same number of elements back.
    """
    needed = needed_blocks(layout, num_kv_heads, size)
    owner = owners(layout.num_key_blocks, size, layout.device)
    counts = torch.stack([needed[:, :, owner == source].sum((1, 2)) for source in range(size)])
    return counts.fill_diagonal_(0)


def gathered_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """Count blocks as `exchanged_blocks`, if every rank gets every block."""
    each = num_kv_heads * layout.num_key_blocks // size
    return torch.full((size, size), each, device=layout.device).fill_diagonal_(0)


@dataclass(frozen=True, eq=False)
class ExchangePlan:
    """What one rank sends and receives, and the resulting positions.

    Received blocks are packed: those of each KV head fill its first `slots`, ascending, and this rank's own blocks
    follow. Thus keys keep their order, every received key is before every query, and both chunks of queries form one
    range from position `slots · block_size` on.

    Attributes:
        rank: in the context parallel group.
        slots: places for received blocks, at least one; unfilled places are in no layout.
        sent: KV heads and own blocks to send, ordered by rank, int64.
        sent_counts, received: number of blocks to and from each rank; 0 to itself.
        places: KV heads and slots of the received blocks, ordered by rank, int64.
        rows: new numbers of this rank's query blocks, int64 [query blocks]; -1 for other ranks' blocks.
        columns: slot of each received block, int64 [H_kv, key blocks]; -1 for all others.
    """

    rank: int
    slots: int
    sent: tuple[Tensor, Tensor]
    sent_counts: list[int]
    places: tuple[Tensor, Tensor]
    received: list[int]
    rows: Tensor
    columns: Tensor

    @property
    def is_full(self) -> bool:
        return len(self.places[0]) == self.slots * len(self.columns)

    @cached_property
    def returned(self) -> Returned:
        """How gradients of sent blocks are summed. The host waits for `sent`."""
        shape = len(self.columns), self.own_blocks
        blocks = np.ravel_multi_index(tuple(x.cpu().numpy() for x in self.sent), shape)
        return Returned.of(np.split(blocks, np.cumsum(self.sent_counts)[:-1]), shape, self.rows.device)

    @property
    def own_blocks(self) -> int:
        return len(self.rows) // len(self.received)

    def whole(self, layout: BlockLayout) -> BlockLayout:
        """Return `layout` of this rank's queries over received and own keys.

        The layout has [slots + own] query and key blocks.
        """
        rows, received = self._numbers()
        moved = np.where(rows >= 0, rows + self.slots, -1)
        columns = np.where(received >= 0, received, moved)
        found = renumber(HostLayout.of(layout), moved, columns, *2 * [self.slots + self.own_blocks])
        return found.to(layout.device)

    def apart(self, layout: BlockLayout) -> tuple[BlockLayout, BlockLayout]:
        """Return `layout` of this rank's queries, over own and received keys apart.

        The layout of own keys numbers queries and keys from 0, that of received keys queries from block `slots` on.
        """
        host, (rows, received) = HostLayout.of(layout), self._numbers()
        own = renumber(host, rows, np.broadcast_to(rows, received.shape), self.own_blocks, self.own_blocks)
        moved = np.where(rows >= 0, rows + self.slots, -1)
        remote = renumber(host, moved, received, self.slots + self.own_blocks, self.slots)
        return own.to(layout.device), remote.to(layout.device)

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """Copy `rows` and `columns` to the host."""
        return self.rows.cpu().numpy(), self.columns.cpu().numpy()


def exchange_plan(layout: BlockLayout, num_kv_heads: int, rank: int, size: int) -> ExchangePlan:
    """Compute what `rank` of `size` sends and receives.

    The host waits for the counts.

    Args:
        layout: of the whole sequence, with equal numbers of query and key blocks, a multiple of 2 · size.
        num_kv_heads: H_kv, a divisor of the layout's heads.
    Raises:
        ValueError: the blocks can't be divided evenly into two chunks per rank.
    """
    num_blocks = layout.num_key_blocks
    if layout.num_query_blocks != num_blocks or num_blocks % (2 * size):
        raise ValueError(
            f"{size} ranks hold 2 · {size} chunks of whole blocks: got {layout.num_query_blocks} query blocks and "
            f"{num_blocks} key blocks; use a length that is a multiple of {2 * size} blocks"
        )
    needed = needed_blocks(layout, num_kv_heads, size)
    owner = owners(num_blocks, size, layout.device)
    is_own = owner == rank
    rows = torch.where(is_own, is_own.cumsum(0) - 1, -1)
    remote = needed[rank] & ~is_own
    columns = torch.where(remote, remote.cumsum(1) - 1, -1)
    unit = max(1, _ALIGNMENT // layout.block_size)
    slots = max(1, -(-int(remote.sum(1).max()) // unit)) * unit
    sent, received = [], []
    for other in range(size):
        head, block = (needed[other] & is_own & (other != rank)).nonzero(as_tuple=True)
        sent.append((head, rows[block]))
        received.append((remote & (owner == other)).nonzero(as_tuple=True))
    (sent_heads, sent_blocks), (heads, blocks) = (
        (torch.cat(parts) for parts in zip(*of_ranks, strict=True)) for of_ranks in (sent, received)
    )
    return ExchangePlan(
        rank,
        slots,
        (sent_heads, sent_blocks),
        [len(head) for head, _ in sent],
        (heads, columns[heads, blocks]),
        [len(head) for head, _ in received],
        rows,
        columns,
    )
