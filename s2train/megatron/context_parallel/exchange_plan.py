"""Which key blocks each context parallel rank needs of each other one: from the layout alone, alike on every rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.layouts.renumber import causal_pairs, renumber

_ALIGNMENT = 128  # tokens: the first query's position is a multiple, as the kernels like it


def owners(num_blocks: int, size: int, device: torch.device) -> Tensor:
    """Int64 [num_blocks]: the rank of `size` that holds each block, of chunks dealt zig-zag."""
    chunk = torch.arange(num_blocks, device=device) // (num_blocks // (2 * size))
    return torch.minimum(chunk, 2 * size - 1 - chunk)


def needed_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """Bool [size, H_kv, key blocks]: kept by any query block of a rank, in any head of a KV head's group.

    Pairs of a key block after the query block don't count: attention is causal.
    """
    num_blocks = layout.num_query_blocks
    owner = owners(num_blocks, size, layout.device)
    num_patterns = (layout.row_offsets.numel() - 1) // num_blocks
    touched = torch.zeros(num_patterns, size, num_blocks, dtype=torch.bool, device=layout.device)
    for pattern in range(num_patterns):
        query, key = causal_pairs(layout, pattern)
        touched[pattern, owner[query], key] = True
    of_head = touched[layout.patterns_of_heads("context parallelism").long()]
    return of_head.view(num_kv_heads, -1, size, num_blocks).any(1).transpose(0, 1)


def exchanged_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """Int64 [source, destination]: blocks of single KV heads that one rank sends another; 0 to itself.

    A block is `block_size` keys and values of one KV head: batch · block_size · (d + d_v) elements. A forward pass
    moves it there, its backward moves as many elements back.
    """
    needed = needed_blocks(layout, num_kv_heads, size)
    owner = owners(layout.num_key_blocks, size, layout.device)
    counts = torch.stack([needed[:, :, owner == source].sum((1, 2)) for source in range(size)])
    return counts.fill_diagonal_(0)


def gathered_blocks(layout: BlockLayout, num_kv_heads: int, size: int) -> Tensor:
    """As `exchanged_blocks`, where every rank gets every block."""
    each = num_kv_heads * layout.num_key_blocks // size
    return torch.full((size, size), each, device=layout.device).fill_diagonal_(0)


@dataclass(frozen=True, eq=False)
class Share:
    """What one rank sends and receives, and where its queries and keys then lie.

    Received blocks are packed: each KV head's fill its first places of `slots`, ascending, and this rank's own
    blocks follow. So keys keep their order, every received key is before every query, and both chunks of queries
    are one range from position `slots · block_size` on.

    Attributes:
        rank: in the context parallel group.
        slots: places for received blocks, at least one; those that no block fills are in no layout.
        sent: for each rank the (KV heads, own blocks) to send it, int64; none to itself.
        heads, places: KV head and slot of the received blocks, rank by rank, int64.
        received: how many come from each rank.
        rows: new numbers of this rank's query blocks among all, int64 [query blocks]; -1 elsewhere.
        columns: the slot of each received block, int64 [H_kv, key blocks]; -1 elsewhere.
    """

    rank: int
    slots: int
    sent: tuple[tuple[Tensor, Tensor], ...]
    heads: Tensor
    places: Tensor
    received: tuple[int, ...]
    rows: Tensor
    columns: Tensor

    @property
    def sent_counts(self) -> list[int]:
        """How many blocks go to each rank."""
        return [len(heads) for heads, _ in self.sent]

    @property
    def own_blocks(self) -> int:
        return len(self.rows) // len(self.sent)

    def whole(self, layout: BlockLayout) -> BlockLayout:
        """`layout` of this rank's queries over received and own keys: [slots + own] blocks each way."""
        columns = torch.where(self.columns >= 0, self.columns, self._moved(self.slots))
        return self._renumbered(layout, self.slots, columns, self.slots + self.own_blocks)

    def own(self, layout: BlockLayout) -> BlockLayout:
        """`layout` of this rank's queries over its own keys, both numbered from 0."""
        return self._renumbered(layout, 0, self.rows.expand_as(self.columns), self.own_blocks)

    def remote(self, layout: BlockLayout) -> BlockLayout:
        """`layout` of this rank's queries, from block `slots` on, over received keys."""
        return self._renumbered(layout, self.slots, self.columns, self.slots)

    def _moved(self, by: int) -> Tensor:
        return torch.where(self.rows >= 0, self.rows + by, -1)

    def _renumbered(self, layout: BlockLayout, first_row: int, columns: Tensor, num_columns: int) -> BlockLayout:
        return renumber(layout, self._moved(first_row), columns, first_row + self.own_blocks, num_columns)


def share_of(layout: BlockLayout, num_kv_heads: int, rank: int, size: int) -> Share:
    """What `rank` of `size` sends and receives; the host waits for the counts.

    Args:
        layout: of the whole sequence, as many query as key blocks, a multiple of 2 · size.
        num_kv_heads: H_kv, a divisor of the layout's heads.
    Raises:
        ValueError: the blocks can't be shared out evenly, two chunks a rank.
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
    heads, blocks = (torch.cat(parts) for parts in zip(*received, strict=True))
    counts = tuple(len(head) for head, _ in received)
    return Share(rank, slots, tuple(sent), heads, columns[heads, blocks], counts, rows, columns)
