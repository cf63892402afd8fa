"""Attention within documents that context parallel ranks divide.

The ranks exchange the keys that the layout keeps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.kernels.layout import BlockLayout
from s2train.layouts.host_layout import HostLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.context_parallel.attention import Attend
from s2train.megatron.context_parallel.document_plan import DocumentPlan, document_plan
from s2train.megatron.context_parallel.documents import AttendDocuments, DividedDocuments, assemble, attend_begun
from s2train.megatron.context_parallel.kv_exchange import Exchange


class DocumentExchange(Exchange):
    """Exchange of one layer, by a `DocumentPlan`.

    A unit is a token of one KV head. Received keys and values are [rows, 1, H_kv, …].
    """

    def __init__(self, plan: DocumentPlan, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(plan, group)
        self.plan = plan

    def units(self, x: Tensor) -> Tensor:
        """View [s, b, H_kv, d] as [s · b · H_kv, d]."""
        return x.flatten(0, 2)

    def received_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.plan.rows, 1, *x.shape[2:]


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
        documents.plans[layout] = document_plan(
            documents, HostLayout.cached(layout), num_kv_heads, group.rank(), group.size(), query.device
        )
    plan: DocumentPlan = documents.plans[layout]
    exchange = DocumentExchange(plan, group)
    key, value = exchange.send(key, value)
    far = None if overlapped else exchange.receive(key, value)

    def own(x: Tensor, sequence: int, chunk: int) -> Tensor:
        return x[documents.rows * chunks.index(chunk) :][: documents.rows, sequence : sequence + 1]

    def begun(sequence: int, chunk: int, rows: Tensor, bounds: Tensor) -> Tensor:
        first = documents.continued(sequence, chunk).length
        return attend_documents(rows, own(key, sequence, chunk)[first:], own(value, sequence, chunk)[first:], bounds)

    done = attend_begun(documents, chunks, query, begun)
    far_key, far_value = far if far is not None else exchange.receive(key, value)

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
