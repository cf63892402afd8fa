"""Attention within documents that context parallel ranks divide.

The ranks exchange the keys that the layout keeps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.kernels.layout import BlockLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.context_parallel.attention import Attend
from s2train.megatron.context_parallel.document_plan import DocumentPlan, document_plan
from s2train.megatron.context_parallel.documents import AttendDocuments, DividedDocuments, assemble, attend_begun
from s2train.megatron.context_parallel.kv_exchange import Exchange


class DocumentExchange(Exchange):
    """Exchange of one layer, by a `DocumentPlan`."""

    def __init__(self, plan: DocumentPlan, num_kv_heads: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(plan.sent_counts, plan.received, group)
        self.plan, self.num_kv_heads = plan, num_kv_heads

    def packed(self, x: Tensor) -> Tensor:
        return x.flatten(0, 2)[torch.cat([part for parts in self.plan.sent for part in parts])]

    def add(self, total: Tensor, packed: Tensor) -> None:
        rows = total.view(-1, total.shape[-1])
        parts = [part for parts in self.plan.sent for part in parts]  # each names a token once
        for where, part in zip(parts, packed.split([len(part) for part in parts]), strict=True):
            rows[where] += part

    def unpacked(self, packed: Tensor) -> Tensor:
        # kernels read partly masked tiles: unfilled rows must be finite
        result = packed.new_zeros(self.plan.rows * self.num_kv_heads, packed.shape[-1])
        result[self.plan.places] = packed
        return result.view(self.plan.rows, 1, self.num_kv_heads, -1)

    def repacked(self, x: Tensor) -> Tensor:
        return x.flatten(0, 2)[self.plan.places]


class _WithUnused(torch.autograd.Function):
    """Pass `out` on; the backward pass reaches `unused` too, with zero gradients."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *unused: Tensor) -> Tensor:
        ctx.shapes = [tensor.shape for tensor in unused]
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(gradient.new_zeros(shape) for shape in ctx.shapes)


def attend_documents_exchanged(
    attend: Attend,
    attend_documents: AttendDocuments,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    documents: DividedDocuments,
    group: torch.distributed.ProcessGroup,
    *,
    overlapped: bool,
) -> Tensor:
    """Compute attention within documents; ranks exchange the keys that the layout keeps.

    Args:
        query, key, value: [s / cp, b, …], this rank's two chunks.
        layout: of a whole sequence and this rank's heads.
        overlapped: compute the documents that begin in the chunks during the exchange.
    """
    chunks, num_kv_heads = chunk_ids(group.rank(), group.size()), key.shape[2]
    if layout not in documents.plans:
        documents.plans[layout] = document_plan(documents, layout, num_kv_heads, group.rank(), group.size())
    plan: DocumentPlan = documents.plans[layout]
    exchange = DocumentExchange(plan, num_kv_heads, group)
    token = exchange.send(key, value)
    far = None if overlapped else exchange.receive(token, key.shape[-1])

    def own(x: Tensor, sequence: int, chunk: int) -> Tensor:
        return x[documents.rows * chunks.index(chunk) :][: documents.rows, sequence : sequence + 1]

    def begun(sequence: int, chunk: int, rows: Tensor, bounds: Tensor) -> Tensor:
        first = documents.continued(sequence, chunk).length
        return attend_documents(rows, own(key, sequence, chunk)[first:], own(value, sequence, chunk)[first:], bounds)

    done = attend_begun(documents, chunks, query, begun)
    far_key, far_value = far if far is not None else exchange.receive(token, key.shape[-1])

    def continued(sequence: int, chunk: int, rows: Tensor) -> Tensor:
        planned = plan.keys[sequence][chunks.index(chunk)]
        assert planned is not None
        first, keys, own_layout = planned
        before = slice(first, first + keys.rows)
        length = keys.document.length
        near_key, near_value = (own(x, sequence, chunk)[:length] for x in (key, value))
        both = torch.cat([far_key[before], near_key]), torch.cat([far_value[before], near_value])
        out = attend(rows, *both, own_layout, keys.rows, return_lse=False)
        assert isinstance(out, Tensor)
        return out

    out = assemble(documents, chunks, done, query, continued)
    if not any(planned for of_chunks in plan.keys for planned in of_chunks):
        out = _WithUnused.apply(out, far_key, far_value)  # every rank takes part in the backward exchange
    return out
