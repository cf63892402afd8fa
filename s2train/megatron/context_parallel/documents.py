"""Attention within packed documents whose sequence is divided over context parallel ranks.

A document may begin at any token. In each of a rank's two chunks, at most one document began before the chunk: its
queries need earlier keys, of any rank. All other documents begin in the chunk and need its own keys only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.kernels.transfer import to_device
from s2train.layouts.host_layout import HostLayout
from s2train.layouts.renumber import renumber
from s2train.megatron.context_parallel.all_gather import chunk_ids, gather_sequence

AttendDocuments = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of one sequence: query, key, value, bounds
AttendLater = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # query, key, value, position of the first query


@dataclass(frozen=True)
class ContinuedDocument:
    """A chunk's part of a document that began before the chunk.

    Attributes:
        first: position in the sequence where the document begins.
        start: position of the chunk's first token.
        length: tokens of the chunk that belong to the document; 0 if a document begins at `start`.
    """

    first: int
    start: int
    length: int

    @classmethod
    def of_chunk(cls, bounds: np.ndarray, chunk: int, rows: int) -> "ContinuedDocument":
        """Find it in a sequence's bounds; a chunk has `rows` tokens."""
        start = chunk * rows
        document = int(np.searchsorted(bounds, start, side="right")) - 1
        first = int(bounds[document])
        length = min(int(bounds[document + 1]), start + rows) - start if first < start else 0
        return cls(first, start, length)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class DividedDocuments(PackedSeqParams):
    """A model's `packed_seq_params` on one context parallel rank.

    Attributes:
        bounds: of whole sequences, int32 [b, documents + 1], on the host; as `packed_documents` takes them.
        rows: tokens of a chunk.
        begun: for each sequence and own chunk the bounds of the documents that begin in the chunk, int32 on the device,
            from 0, where the continued document ends; None if the continued document fills the chunk.
        plans: what layers exchange, by layout; made in the first forward pass.
        later: what `later_layout` returned, by layout and blocks.
    """

    bounds: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.int32))
    rows: int = 0
    begun: tuple[tuple[Tensor | None, ...], ...] = ()
    plans: dict[Any, Any] = field(default_factory=dict)
    later: dict[tuple[BlockLayout, int, int], BlockLayout] = field(default_factory=dict)

    def continued(self, sequence: int, chunk: int) -> ContinuedDocument:
        return ContinuedDocument.of_chunk(self.bounds[sequence], chunk, self.rows)

    def later_layout(self, layout: BlockLayout, first: int, length: int) -> BlockLayout:
        """Return `layout` of `length` queries of a document from position `first` on.

        Its kernels are scheduled on the host: a schedule depends on the micro batch's documents, and on the device its
        making would wait each time.
        """
        begin, end = first // layout.block_size, -(-(first + length) // layout.block_size)
        if (layout, begin, end) not in self.later:
            blocks = np.arange(layout.num_query_blocks)
            columns = np.where(blocks < end, blocks, -1)
            rows = np.where(blocks >= begin, columns, -1)
            host = HostLayout.cached(layout)
            self.later[layout, begin, end] = renumber(host, rows, columns[None], end, end).copied_to(layout.device)
        return self.later[layout, begin, end]


def divided_documents(
    bounds: Tensor, seq_length: int, rank: int, size: int, device: torch.device | str
) -> DividedDocuments:
    """Make a model's `packed_seq_params` for rank `rank` of `size`.

    Args:
        bounds: int32 [b, documents + 1] on the CPU, as `packed_documents` takes them.
        seq_length: of whole sequences.
    """
    on_host, rows = bounds.numpy(), seq_length // (2 * size)
    begun = [
        [_begun(row, ContinuedDocument.of_chunk(row, chunk, rows), rows) for chunk in chunk_ids(rank, size)]
        for row in on_host
    ]
    return DividedDocuments(
        qkv_format="sbhd",
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
        bounds=on_host,
        rows=rows,
        begun=tuple(tuple(None if part is None else to_device(part, device) for part in parts) for parts in begun),
    )


def _begun(bounds: np.ndarray, continued: ContinuedDocument, rows: int) -> np.ndarray | None:
    """Return the chunk's bounds from the end of its continued document.

    Their number is a power of two, plus 1.
    """
    first, stop = continued.end, continued.start + rows
    if first == stop:
        return None
    inside = np.unique(bounds[(bounds > first) & (bounds < stop)])
    found = np.full((1 << len(inside).bit_length()) + 1, stop - first, np.int32)
    found[0] = 0
    found[1 : 1 + len(inside)] = inside - first
    return found


def attend_documents_gathered(
    attend: AttendLater,
    attend_documents: AttendDocuments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: DividedDocuments,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Compute attention within documents; gathers the keys of whole sequences.

    Args:
        attend: of a document's later queries over its keys from the document's first on.
        query, key, value: [s / cp, b, …], this rank's two chunks.
    """
    key, value = gather_sequence(key, group), gather_sequence(value, group)
    chunks = chunk_ids(group.rank(), group.size())

    def continued(sequence: int, chunk: int, rows: Tensor) -> Tensor:
        part, column = documents.continued(sequence, chunk), slice(sequence, sequence + 1)
        keys, values = (x[part.first : part.end, column] for x in (key, value))
        return attend(rows, keys, values, part.start - part.first)

    def begun(sequence: int, chunk: int, rows: Tensor, bounds: Tensor) -> Tensor:
        part, column = documents.continued(sequence, chunk), slice(sequence, sequence + 1)
        keys, values = (x[part.end : part.start + documents.rows, column] for x in (key, value))
        return attend_documents(rows, keys, values, bounds)

    return assemble(documents, chunks, attend_begun(documents, chunks, query, begun), query, continued)


def attend_begun(
    documents: DividedDocuments,
    chunks: Sequence[int],
    query: Tensor,
    attend: Callable[[int, int, Tensor, Tensor], Tensor],
) -> list[list[Tensor | None]]:
    """Compute attention of documents that begin in the chunks.

    The result has a list of chunks for each sequence.

    Args:
        attend: takes sequence, chunk, their query rows, and bounds.
    """
    found: list[list[Tensor | None]] = []
    for sequence, of_chunks in enumerate(documents.begun):
        found.append([])
        for number, bounds in enumerate(of_chunks):
            part = documents.continued(sequence, chunks[number])
            rows = query[number * documents.rows :][part.length : documents.rows, sequence : sequence + 1]
            found[-1].append(None if bounds is None else attend(sequence, chunks[number], rows, bounds))
    return found


def assemble(
    documents: DividedDocuments,
    chunks: Sequence[int],
    begun: list[list[Tensor | None]],
    query: Tensor,
    attend: Callable[[int, int, Tensor], Tensor],
) -> Tensor:
    """Compute attention of continued documents, and put all rows in order.

    The result is [s / cp, b, h, d].

    Args:
        begun: as `attend_begun` returns it.
        attend: takes sequence, chunk and their query rows.
    """
    sequences = []
    for sequence, of_chunks in enumerate(begun):
        parts: list[Tensor] = []
        for number, own in enumerate(of_chunks):
            length = documents.continued(sequence, chunks[number]).length
            if length:
                rows = query[number * documents.rows :][:length, sequence : sequence + 1]
                parts.append(attend(sequence, chunks[number], rows))
            if own is not None:
                parts.append(own)
        sequences.append(torch.cat(parts))
    return torch.cat(sequences, dim=1)
