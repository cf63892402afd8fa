"""Plan which keys ranks exchange for documents that are divided over them.

A layout restarts in each document, at any token. So the blocks that a document's queries keep lie anywhere in the
sequence, and ranks exchange runs of tokens. Which ones depends on the micro batch's documents: each rank computes it on
the host, from the documents and the layout, without asking the others or waiting for the device.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.kernels.transfer import to_device
from s2train.layouts.host_layout import HostLayout
from s2train.layouts.renumber import renumber
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.context_parallel.documents import ContinuedDocument, DividedDocuments
from s2train.megatron.context_parallel.returned import Returned


@dataclass(frozen=True)
class Runs:
    """Runs of consecutive tokens of a KV head that one rank needs.

    The arrays are int64, and of equal length.

    Attributes:
        sequences, heads: whose tokens they are.
        starts, lengths: positions in the sequence; a run lies in one chunk.
        places: rows of the receiver's buffer.
        parts: 0 or 1, the receiver's chunk.
    """

    sequences: np.ndarray
    heads: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    parts: np.ndarray

    def at(self, chosen: np.ndarray) -> "Runs":
        """Return the chosen runs."""
        return Runs(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class ContinuedKeys:
    """Keys before a chunk that a continued document's queries need.

    Whole blocks, counted from the document's first token, fill the first `slots` blocks. The tokens that precede the
    chunk in the block of its first query follow, and then the chunk's own tokens. Thus keys keep their order.

    Attributes:
        document: the document.
        needed: bool [H_kv, blocks before the first query's block].
        slots: blocks of `block_size` tokens.
    """

    document: ContinuedDocument
    needed: np.ndarray
    slots: int
    block_size: int

    @classmethod
    def of(cls, document: ContinuedDocument, layout: HostLayout, num_kv_heads: int) -> "ContinuedKeys":
        """Find the blocks before a chunk that each KV head needs.

        These are the blocks that the chunk's queries of the document keep in any head of the KV head's group.
        """
        first = (document.start - document.first) // layout.block_size
        last = (document.end - 1 - document.first) // layout.block_size
        kept = np.zeros((layout.num_patterns, first), bool)
        for pattern in range(layout.num_patterns):
            begin, end = layout.offsets[pattern * layout.num_rows + np.array([first, last + 1])]
            columns = layout.columns[begin:end]
            kept[pattern, columns[columns < first]] = True
        of_head = kept[layout.pattern_of_head]
        needed = of_head.reshape(num_kv_heads, len(of_head) // num_kv_heads, first).any(1)
        return cls(document, needed, int(needed.sum(1).max(initial=0)), layout.block_size)

    @property
    def first_block(self) -> int:
        """Block of the first query, counted from the document's first token."""
        return self.needed.shape[1]

    @property
    def rows(self) -> int:
        """Rows before the chunk's own, and the position of the first query."""
        return self.slots * self.block_size + (self.document.start - self.document.first) % self.block_size

    def runs(self, sequence: int, part: int, first_row: int, chunk_rows: int) -> Runs:
        """Return what to send.

        `first_row` is the first row of the receiver's buffer.
        """
        size, kv_heads = self.block_size, len(self.needed)
        heads, blocks = self.needed.nonzero()
        slots = (self.needed.cumsum(1) - 1)[heads, blocks]
        partial = self.rows - self.slots * size
        heads = np.concatenate([heads, np.arange(kv_heads)])
        blocks = np.concatenate([blocks, np.full(kv_heads, self.first_block)])
        places = first_row + size * np.concatenate([slots, np.full(kv_heads, self.slots)])
        lengths = np.full(len(heads), size)
        lengths[len(slots) :] = partial
        starts = self.document.first + size * blocks
        # A block may begin in one chunk and end in the next.
        beyond = np.maximum(0, starts + lengths - (starts // chunk_rows + 1) * chunk_rows)
        within = lengths - beyond
        both = [np.concatenate(pair) for pair in (
            (heads, heads), (starts, starts + within), (within, beyond), (places, places + within),
        )]  # fmt: skip
        heads, starts, lengths, places = (array[both[2] > 0] for array in both)
        of_all = np.full(len(heads), sequence), np.full(len(heads), part)
        return Runs(of_all[0], heads, starts, lengths, places, of_all[1])

    def layout(self, layout: HostLayout, device: torch.device | str) -> BlockLayout:
        """Return `layout` of the document's queries in the chunk, on `device`.

        Its keys are these keys and the chunk's.
        """
        count = (self.document.end - 1 - self.document.first) // self.block_size + 1 - self.first_block
        rows = np.full(layout.num_rows, -1)
        rows[self.first_block : self.first_block + count] = self.slots + np.arange(count)
        columns = np.tile(rows, (len(self.needed), 1))
        columns[:, : self.first_block] = np.where(self.needed, self.needed.cumsum(1) - 1, -1)
        return renumber(layout, rows, columns, self.slots + count, self.slots + count).copied_to(device)


@dataclass(frozen=True, eq=False)
class DocumentPlan:
    """What one rank sends and receives for a layout and micro batch.

    Attributes:
        sent_parts: indices into own keys [s / cp · b · H_kv], by receiver, in two parts: its chunks.
        sent_counts, received: tokens to and from each rank, itself too.
        places: indices into the buffer [rows · H_kv], ordered by sender.
        rows: of the buffer; at least one.
        own_keys: number of own keys.
        is_full: whether the received tokens fill the buffer.
        keys: of each sequence and own chunk: first row in the buffer, keys, layout; None without a continued document.
    """

    sent_parts: list[np.ndarray]
    sent_counts: list[int]
    received: list[int]
    places: tuple[Tensor]
    rows: int
    own_keys: int
    is_full: bool
    keys: tuple[tuple[tuple[int, ContinuedKeys, BlockLayout] | None, ...], ...]

    @cached_property
    def sent(self) -> tuple[Tensor]:
        """Indices into own keys, ordered by receiver."""
        return (to_device(np.concatenate(self.sent_parts), self.places[0].device),)

    @cached_property
    def returned(self) -> Returned:
        """How gradients of sent tokens are summed."""
        return Returned.of(self.sent_parts, (self.own_keys,), self.places[0].device)


def document_plan(
    documents: DividedDocuments,
    layout: HostLayout,
    num_kv_heads: int,
    rank: int,
    size: int,
    device: torch.device | str,
) -> DocumentPlan:
    """Compute what `rank` of `size` exchanges.

    The host waits for no device.

    Args:
        layout: of a whole sequence and this rank's heads.
        num_kv_heads: H_kv, a divisor of the layout's heads.
        device: of the plan's tensors and layouts.
    """
    batch = len(documents.bounds)
    sent: list[np.ndarray] = []  # of each receiver's two chunks, which may need the same tokens
    sent_counts: list[int] = []
    for receiver in range(size):
        needs = _Needs.of(documents, layout, num_kv_heads, receiver, size)
        mine = needs.runs.at(needs.senders == rank)
        chunk, place = np.divmod(mine.starts, documents.rows)
        local = place + documents.rows * (chunk >= size)  # the second of this rank's chunks
        first = (local * batch + mine.sequences) * num_kv_heads + mine.heads
        for part in (0, 1):
            of_part = mine.parts == part
            sent.append(_expanded(first[of_part], mine.lengths[of_part], batch * num_kv_heads))
        sent_counts.append(int(mine.lengths.sum()))
        if receiver == rank:
            own = needs
    order = np.argsort(own.senders, kind="stable")
    runs = own.runs.at(order)
    places = _expanded(runs.places * num_kv_heads + runs.heads, runs.lengths, num_kv_heads)
    keys = [None if at is None else (*at, at[1].layout(layout, device)) for at in own.keys]
    return DocumentPlan(
        sent_parts=sent,
        sent_counts=sent_counts,
        received=[int(own.runs.lengths[own.senders == sender].sum()) for sender in range(size)],
        places=(to_device(places, device),),
        rows=max(1, own.rows),
        own_keys=2 * documents.rows * batch * num_kv_heads,
        is_full=0 < own.rows * num_kv_heads == len(places),
        keys=tuple((keys[sequence], keys[batch + sequence]) for sequence in range(batch)),
    )


@dataclass(frozen=True)
class _Needs:
    """What one rank needs from all ranks.

    Attributes:
        runs, senders: tokens, first those of the first chunk; and who has them.
        rows: of the buffer.
        keys: first row and keys of each chunk and sequence, chunk by chunk; None without a continued document.
    """

    runs: Runs
    senders: np.ndarray
    rows: int
    keys: list[tuple[int, ContinuedKeys] | None]

    @classmethod
    def of(
        cls, documents: DividedDocuments, layout: HostLayout, num_kv_heads: int, receiver: int, size: int
    ) -> "_Needs":
        runs: list[Runs] = []
        keys: list[tuple[int, ContinuedKeys] | None] = []
        rows = 0
        for part, chunk in enumerate(chunk_ids(receiver, size)):
            for sequence in range(len(documents.bounds)):
                document = documents.continued(sequence, chunk)
                if not document.length:
                    keys.append(None)
                    continue
                found = ContinuedKeys.of(document, layout, num_kv_heads)
                keys.append((rows, found))
                runs.append(found.runs(sequence, part, rows, documents.rows))
                rows += found.rows
        together = _concatenated(runs)
        chunks = together.starts // documents.rows
        return cls(together, np.minimum(chunks, 2 * size - 1 - chunks), rows, keys)


def _concatenated(runs: list[Runs]) -> Runs:
    none = np.zeros(0, np.int64)
    return Runs(*(np.concatenate([none, *(getattr(r, name) for r in runs)]) for name in Runs.__dataclass_fields__))


def _expanded(first: np.ndarray, lengths: np.ndarray, stride: int) -> np.ndarray:
    """Return the indices of runs' tokens, `stride` apart within a run."""
    before = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(first, lengths) + stride * (np.arange(len(before)) - before)
