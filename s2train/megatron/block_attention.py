"""Core attention over static block layouts: dense and S2."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.dense_choice import DenseChoice, Kind, dense_order
from s2train.kernels.dispatch import kernels_in_use
from s2train.kernels.layout import BlockLayout
from s2train.megatron.context_parallel.attention import attend_after_exchange, attend_gathered, attend_overlapped
from s2train.megatron.context_parallel.document_exchange import attend_documents_exchanged
from s2train.megatron.context_parallel.documents import DividedDocuments, attend_documents_gathered
from s2train.megatron.core_attention import CausalCoreAttention, PackedDocuments, cores_of
from s2train.megatron.dense_kernels import CallInputs, choose_kernels, run_dense, runs_sparse_op

MakeLayout = Callable[[], BlockLayout]


class BlockCoreAttention(CausalCoreAttention):
    """Core attention of a static kind, computed from its layer's layout.

    Under context parallel, K and V come from other ranks.
    """

    captures_decoding = True

    def attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """Compute attention within each document of [s, b, h, d].

        Layouts restart too.
        """
        if isinstance(packed, DividedDocuments):
            return self.attend_divided_documents(query, key, value, packed)
        if not isinstance(packed, PackedDocuments) or self.kv is not None or self.cp_group.size() > 1:
            raise NotImplementedError("packed documents come as packed_documents or divided_documents makes them")
        layout = self.cache.get(self.layer_layout, key.shape[0], self.heads, query.device)
        parts = []
        # the op takes one packed sequence; q, k and v of a single sequence are read in place
        for q, k, v, bounds in zip(*(x.split(1, dim=1) for x in (query, key, value)), packed.on_device, strict=True):
            parts.append(self.attend_document(q, k, v, layout, bounds))
        return torch.cat(parts, dim=1)

    def attend_divided_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: DividedDocuments
    ) -> torch.Tensor:
        """Compute attention within documents of this context parallel rank's two chunks.

        All keys are gathered.
        """
        layout = self._layout_of(documents, query.device)

        def later(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_offset: int) -> torch.Tensor:
            later_layout = partial(documents.later_layout, layout, query_offset, len(q))
            return self.attend_later(q, k, v, later_layout, query_offset)

        def begun(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            return self.attend_document(q, k, v, layout, bounds)

        return attend_documents_gathered(later, begun, query, key, value, documents, self.cp_group)

    def attend_later(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: MakeLayout, query_offset: int
    ) -> torch.Tensor:
        """Compute attention as `attend`; `layout` is called if kernels need one."""
        out = self.attend_by_layout(query, key, value, layout(), query_offset, return_lse=False)
        assert isinstance(out, torch.Tensor)
        return out

    def _layout_of(self, documents: DividedDocuments, device: torch.device) -> BlockLayout:
        assert documents.max_seqlen_q is not None
        return self.cache.get(self.layer_layout, documents.max_seqlen_q, self.heads, device)

    def attend_document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: BlockLayout, bounds: torch.Tensor
    ) -> torch.Tensor:
        """Compute attention within each document of one sequence [s, 1, h, d].

        `bounds` is int32 [documents + 1].
        """
        if self.kernels is None:
            self.kernels = kernels_in_use(query, key, value, layout, cu_seqlens=bounds, backend=self.backend)
        return block_sparse_attention(
            query, key, value, layout, softmax_scale=self.softmax_scale, cu_seqlens=bounds, backend=self.backend
        )

    def attend_across_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention of this context parallel rank's two chunks, as `attend`.

        All keys are gathered.
        """
        return attend_gathered(self.attend, query, key, value, self.cp_group)

    def attend_cached(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert self.kv is not None
        return self.kv.attend(query, key, value)

    def attend_by_layout(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: BlockLayout,
        query_offset: int,
        return_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the sparse op, and remember the kernels of the first call."""
        if self.kernels is None:
            self.kernels = kernels_in_use(query, key, value, layout, query_offset=query_offset, backend=self.backend)
        scale, backend = self.softmax_scale, self.backend
        if return_lse:
            return block_sparse_attention(
                query, key, value, layout, softmax_scale=scale, query_offset=query_offset, return_lse=True,
                backend=backend,
            )  # fmt: skip
        return block_sparse_attention(
            query, key, value, layout, softmax_scale=scale, query_offset=query_offset, backend=backend
        )


class DenseCoreAttention(BlockCoreAttention):
    """Core attention in which every head keeps everything.

    `implementation` is the run's `dense_attention`; `choices` are the kernels chosen for each kind of call.
    """

    implementation = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choices: dict[Kind, DenseChoice] = {}
        self._chosen: dict[tuple[Any, ...], DenseChoice] = {}

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        return self.attend_later(query, key, value, partial(self.full_layout, key), query_offset)

    def attend_later(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: MakeLayout, query_offset: int
    ) -> torch.Tensor:
        inputs = CallInputs(query, key, value)
        assert inputs.query_offset == query_offset
        implementation = "auto"
        if query.shape[0] > 1 and (query.is_cuda or self.implementation == "s2train"):
            implementation = self.choose(inputs).implementation
        return self._run(implementation, inputs, layout)

    def attend_document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: BlockLayout, bounds: torch.Tensor
    ) -> torch.Tensor:
        inputs = CallInputs(query, key, value, bounds)
        implementation = self.choose(inputs).implementation if query.is_cuda else "s2train"
        return self._run(implementation, inputs, lambda: layout)

    def _run(self, implementation: str, inputs: CallInputs, layout: MakeLayout) -> torch.Tensor:
        """Run the chosen kernels; `layout` is called if they need one."""
        needed = layout() if runs_sparse_op(implementation, inputs.bounds) else None
        if needed is not None and self.kernels is None:
            self.kernels = kernels_in_use(
                inputs.query, inputs.key, inputs.value, needed, query_offset=inputs.query_offset,
                cu_seqlens=inputs.bounds, backend=self.backend,
            )  # fmt: skip
        return run_dense(inputs, implementation, needed, self.softmax_scale, self.backend)

    def cached_layout(self, max_length: int, device: torch.device) -> None:
        return None

    def full_layout(self, key: torch.Tensor) -> BlockLayout:
        """Return a layout that keeps every block, for the sparse op."""
        length = key.shape[0] if self.kv is None else self.kv.max_length
        return self.cache.get(self.layer_layout, length, self.heads, key.device)

    def choose(self, inputs: CallInputs) -> DenseChoice:
        """Choose the kernels for a call.

        Cached in `choices` per type of call.
        """
        kind, query, key, value = inputs.kind, inputs.query, inputs.key, inputs.value
        deterministic = torch.are_deterministic_algorithms_enabled()
        shapes = (query.shape[1:], key.shape[1:], query.stride(), value.stride())
        call = (kind, query.dtype, *shapes, deterministic, dense_order(kind, key.shape[0]))
        if call in self._chosen:
            return self._chosen[call]
        choice = choose_kernels(inputs, self.implementation, self.backend, lambda: self.full_layout(key))
        self._chosen[call] = choice
        self.choices.setdefault(kind, choice)
        return choice


class SparseCoreAttention(BlockCoreAttention):
    """Core attention in which every head keeps the blocks of its pattern."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        layout = self.layout(key.shape[0] if self.kv is None else self.kv.max_length, query.device)
        out = self.attend_by_layout(query, key, value, layout, query_offset, return_lse=False)
        assert isinstance(out, torch.Tensor)
        return out

    def attend_across_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.cp_exchange == "gather":
            return super().attend_across_ranks(query, key, value)
        layout = self.layout(key.shape[0] * self.cp_group.size(), query.device)
        attend = attend_overlapped if self.cp_exchange == "overlapped" else attend_after_exchange
        return attend(self.attend_by_layout, query, key, value, layout, self.cp_group)

    def attend_divided_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: DividedDocuments
    ) -> torch.Tensor:
        if self.cp_exchange == "gather":
            return super().attend_divided_documents(query, key, value, documents)
        layout = self._layout_of(documents, query.device)

        def begun(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            return self.attend_document(q, k, v, layout, bounds)

        return attend_documents_exchanged(
            self.attend_by_layout, begun, query, key, value, layout, documents, self.cp_group,
            overlapped=self.cp_exchange == "overlapped",
        )  # fmt: skip

    def layout(self, seq_length: int, device: torch.device) -> BlockLayout:
        """Return the layout of this rank's heads over `seq_length` tokens."""
        return self.cache.get(self.layer_layout, seq_length, self.heads, device)

    def cached_layout(self, max_length: int, device: torch.device) -> BlockLayout:
        return self.layout(max_length, device)


def kernels_of(models: Iterable[torch.nn.Module]) -> list[str]:
    """List the kernels that these models' attention layers ran.

    Duplicates are left out.
    """
    lines: dict[str, None] = {}
    for layer in cores_of(*models):
        if isinstance(layer, DenseCoreAttention):
            lines |= dict.fromkeys(f"dense attention, {choice}" for choice in layer.choices.values())
        if layer.kernels is not None:
            kind = "dense" if isinstance(layer, DenseCoreAttention) else "sparse"
            lines[f"{kind} attention: {layer.kernels}"] = None
    return list(lines)
