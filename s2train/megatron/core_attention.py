"""Core attention over block layouts, in the place of Megatron's."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from s2train.kernels.attention import Backend, block_sparse_attention
from s2train.kernels.dense import dense_causal_attention, torch_refuses
from s2train.kernels.dense_choice import DenseCall, DenseChoice, Kind, choose_dense, dense_order
from s2train.kernels.dispatch import KernelsInUse, kernels_in_use
from s2train.kernels.flash4 import fa4_attention
from s2train.kernels.layout import BlockLayout
from s2train.layouts.hybrid import LayerLayout
from s2train.megatron.context_parallel.attention import attend_gathered, attend_overlapped, attend_together


class LayoutCache:
    """Device layouts by what they are made of: layers with the same heads share one.

    Holds the `capacity` most recent, since an evaluation may bring many lengths.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._layouts: dict[tuple[LayerLayout, int, int, int, torch.device], BlockLayout] = {}

    def get(self, layer: LayerLayout, seq_length: int, heads: tuple[int, int], device: torch.device) -> BlockLayout:
        """Layout of heads [first, last) of a layer over `seq_length` tokens."""
        key = (layer, seq_length, *heads, device)
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = layer.block_layout(seq_length, heads=slice(*heads), device=device)
            if len(self._layouts) >= self._capacity:
                self._layouts.pop(next(iter(self._layouts)))
        self._layouts[key] = layout
        return layout


class AttentionCache(Protocol):
    """Keys and values of one layer while decoding; see `s2train.inference.kv_cache`."""

    max_length: int

    def attend(
        self, core: "CausalCoreAttention", query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of new tokens [s_q, b, h, d] over what is kept and themselves; [s_q, b, h, d]."""
        ...


def packed_documents(bounds: torch.Tensor, seq_length: int) -> PackedSeqParams:
    """What a model takes as `packed_seq_params` for documents packed along its sequences.

    Hidden states stay [s, b, h] and rotation goes on from document to document: rotary scores depend on distances
    alone, so that cutting attention is all it takes.

    Args:
        bounds: int32 [b, documents + 1], each row 0, ascending, `seq_length`; documents may be empty.
    """
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
    )


class CausalCoreAttention(MegatronModule):
    """Causal attention of one layer; satisfies Megatron's core attention protocol. A subclass says what is kept.

    Reads of the config: `num_attention_heads`, `kv_channels`. Heads are contiguous over tensor parallel ranks;
    sequence parallel does not reach it. Under context parallel K and V come from the other ranks.

    Args:
        layer_layout: heads of this layer, all of them.
        cache: where device layouts are kept, shared by the layers of a model.
        backend: of the sparse op: auto, triton, portable or torch.
        cp_exchange: how sparse layers get keys of other context parallel ranks, as `parallel.cp_exchange`.
    Raises:
        NotImplementedError: attention dropout or biases, which no layout describes; packed documents while decoding or
            under context parallel.

    `kernels` are those of the sparse op that its first call ran, None where it has not been called.
    """

    kernels: KernelsInUse | None = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        layer_layout: LayerLayout,
        cache: LayoutCache,
        backend: Backend,
        cp_exchange: str = "gather",
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if attention_type != "self" or (attention_dropout or config.attention_dropout):
            raise NotImplementedError("block layouts serve causal self attention without dropout")
        self.layer_number = layer_number
        self.layer_layout, self.backend, self.cp_exchange = layer_layout, backend, cp_exchange
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.cp_group = pg_collection.cp
        local_heads = config.num_attention_heads // pg_collection.tp.size()
        first = local_heads * pg_collection.tp.rank()
        self.heads = (first, first + local_heads)
        self.num_kv_heads = (config.num_query_groups or config.num_attention_heads) // pg_collection.tp.size()
        self.cache = cache
        self.kv: AttentionCache | None = None  # attached while decoding

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [s_q, b, heads / tp, d], rotated; under context parallel s_q = s / cp.
            key, value: [s_k, b, KV heads / tp, d], not expanded. Without context parallel the last query is at the
                position of the last key, so that a chunk may follow cached keys.
            attention_mask, attn_mask_type: ignored: attention is causal, within the layout.
            packed_seq_params: as `packed_documents` makes them; then attention and layout restart in each document.
        Returns:
            [s_q, b, heads / tp · d].
        """
        if attention_bias is not None:
            raise NotImplementedError("attention biases are not supported")
        size = self.cp_group.size()
        if packed_seq_params is not None:
            out = self.attend_documents(query, key, value, packed_seq_params)
        elif self.kv is not None:
            out = self.kv.attend(self, query, key, value)
        elif size == 1:
            out = self.attend(query, key, value, query_offset=key.shape[0] - query.shape[0])
        else:
            out = self.attend_across_ranks(query, key, value)
        return out.reshape(*out.shape[:2], -1)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        """Attention of [s_q, b, h, d] queries at positions `query_offset` … over [s_k, b, h_kv, d] keys from 0 on.

        The last query is at the last key. Returns [s_q, b, h, d].
        """
        raise NotImplementedError

    def attend_documents(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSeqParams
    ) -> torch.Tensor:
        """Attention within each document of sequences [s, b, h, d]."""
        if packed.qkv_format != "sbhd" or self.kv is not None or self.cp_group.size() > 1:
            raise NotImplementedError("packed documents come as packed_documents makes them, to train, without cp")
        layout = self.cache.get(self.layer_layout, key.shape[0], self.heads, query.device)
        parts = []
        # the op takes one packed sequence; q, k and v of one are read where they lie
        for q, k, v, bounds in zip(*(x.split(1, dim=1) for x in (query, key, value)), packed.cu_seqlens_q, strict=True):
            parts.append(self.attend_document(q, k, v, layout, bounds))
        return torch.cat(parts, dim=1)

    def attend_document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: BlockLayout, bounds: torch.Tensor
    ) -> torch.Tensor:
        """Attention within each document of one sequence [s, 1, h, d]; `bounds` int32 [documents + 1]."""
        if self.kernels is None:
            self.kernels = kernels_in_use(query, key, value, layout, cu_seqlens=bounds, backend=self.backend)
        return block_sparse_attention(
            query, key, value, layout, softmax_scale=self.softmax_scale, cu_seqlens=bounds, backend=self.backend
        )

    def attend_across_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `attend`, of the two chunks of the sequence that this context parallel rank holds; all keys gathered."""
        return attend_gathered(self.attend, query, key, value, self.cp_group)

    def layout(self, seq_length: int, device: torch.device) -> BlockLayout | None:
        """What this rank's heads keep of `seq_length` tokens; None: everything."""
        return None

    def attend_by_layout(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: BlockLayout,
        query_offset: int,
        return_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if self.kernels is None:
            self.kernels = kernels_in_use(
                query, key, value, layout, query_offset=query_offset, backend=self.backend
            )  # fmt: skip
        scale, backend = self.softmax_scale, self.backend
        if return_lse:
            return block_sparse_attention(
                query, key, value, layout, softmax_scale=scale, query_offset=query_offset, return_lse=True,
                backend=backend,
            )  # fmt: skip
        return block_sparse_attention(
            query, key, value, layout, softmax_scale=scale, query_offset=query_offset, backend=backend
        )


class DenseCoreAttention(CausalCoreAttention):
    """Every head keeps everything.

    `implementation` is the run's `dense_attention`; `choices` are what it came to, by kind of call.
    """

    implementation = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.choices: dict[Kind, DenseChoice] = {}
        self._chosen: dict[tuple[Any, ...], DenseChoice] = {}

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        implementation = "auto"
        if query.shape[0] > 1 and (query.is_cuda or self.implementation == "s2train"):
            kind: Kind = "whole" if query.shape[0] == key.shape[0] else "later"
            implementation = self.choose(kind, query, key, value, query_offset).implementation
            if implementation == "s2train":
                layout = self.full_layout(key)
                out = self.attend_by_layout(query, key, value, layout, query_offset, return_lse=False)
                assert isinstance(out, torch.Tensor)
                return out
        return dense_causal_attention(
            query,
            key,
            value,
            softmax_scale=self.softmax_scale,
            query_offset=query_offset,
            implementation=implementation,
        )

    def attend_document(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: BlockLayout, bounds: torch.Tensor
    ) -> torch.Tensor:
        if query.is_cuda:
            choice = self.choose("documents", query, key, value, 0, bounds)
            if choice.implementation == "fa4":
                deterministic = torch.are_deterministic_algorithms_enabled()
                return fa4_attention(
                    query, key, value, softmax_scale=self.softmax_scale, bounds=bounds, deterministic=deterministic
                )
        return super().attend_document(query, key, value, layout, bounds)

    def full_layout(self, key: torch.Tensor) -> BlockLayout:
        """Every block of these keys kept, for the sparse op."""
        length = key.shape[0] if self.kv is None else self.kv.max_length
        return self.cache.get(self.layer_layout, length, self.heads, key.device)

    def choose(
        self,
        kind: Kind,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_offset: int,
        bounds: torch.Tensor | None = None,
    ) -> DenseChoice:
        """The kernels for such a call; decided once for each sort, and kept in `choices`."""
        deterministic = torch.are_deterministic_algorithms_enabled()
        shapes = (query.shape[1:], key.shape[1:], query.stride(), value.stride())
        sort = (kind, query.dtype, *shapes, deterministic, dense_order(kind, key.shape[0]))
        if sort in self._chosen:
            return self._chosen[sort]
        call = DenseCall(
            kind,
            query.dtype,
            query.shape[-1],
            query.shape[2] != key.shape[2],
            deterministic,
            torch.cuda.get_device_capability(query.device) if query.is_cuda else None,
            key.shape[0],
        )

        def serves(name: str) -> str | None:
            if name != "s2train":
                return torch_refuses(name, query, key, value)
            layout, backend = self.full_layout(key), self.backend
            used = kernels_in_use(
                query, key, value, layout, query_offset=query_offset, cu_seqlens=bounds, backend=backend
            )
            # the portable kernels are slower than torch's, but for a deterministic backward; torch has no documents
            fast = used.forward == "hopper" and (used.backward == "hopper" or deterministic)
            return None if fast or kind == "documents" or self.implementation == name else str(used)

        choice = choose_dense(call, self.implementation, serves)
        self._chosen[sort] = choice
        self.choices.setdefault(kind, choice)
        return choice


class SparseCoreAttention(CausalCoreAttention):
    """Every head keeps the blocks of its pattern."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_offset: int) -> torch.Tensor:
        layout = self.layout(key.shape[0] if self.kv is None else self.kv.max_length, query.device)
        out = self.attend_by_layout(query, key, value, layout, query_offset, return_lse=False)
        assert isinstance(out, torch.Tensor)
        return out

    def attend_across_ranks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.cp_exchange == "gather":
            return super().attend_across_ranks(query, key, value)
        layout = self.layout(key.shape[0] * self.cp_group.size(), query.device)
        attend = attend_overlapped if self.cp_exchange == "overlapped" else attend_together
        return attend(self.attend_by_layout, query, key, value, layout, self.cp_group)

    def layout(self, seq_length: int, device: torch.device) -> BlockLayout:
        return self.cache.get(self.layer_layout, seq_length, self.heads, device)


def kernels_of(models: Iterable[torch.nn.Module]) -> list[str]:
    """What the attention layers of these models ran, a line for each way once."""
    lines: dict[str, None] = {}
    for layer in (m for model in models for m in model.modules() if isinstance(m, CausalCoreAttention)):
        if isinstance(layer, DenseCoreAttention):
            lines |= dict.fromkeys(f"dense attention, {choice}" for choice in layer.choices.values())
        if layer.kernels is not None:
            sort = "dense" if isinstance(layer, DenseCoreAttention) else "sparse"
            lines[f"{sort} attention: {layer.kernels}"] = None
    return list(lines)
