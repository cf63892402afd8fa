"""vLLM's attention backend of sparse layers.

Prefill and decoding run our kernels over vLLM's pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.decode.op import append_token, block_sparse_decode
from s2train.kernels.decode.schedule import decode_schedule
from s2train.kernels.layout import BlockLayout
from s2train.layouts.patterns import Pattern
from s2train.serving.export_layout import layer_layout
from s2train.serving.kv_cache import S2Spec
from s2train.serving.warm_up import compile_kernels


class S2Backend(AttentionBackend):
    """Block-sparse attention; vLLM knows it as CUSTOM."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[S2Attention]:
        return S2Attention

    @staticmethod
    def get_builder_cls() -> type[S2MetadataBuilder]:
        return S2MetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Return the pages' shape [pages, 2, tokens of one KV head, d].

        Each page holds its keys, then its values. vLLM's own backends have pages in the same bytes, and other layers
        use them.
        """
        return num_blocks, 2, block_size * num_kv_heads, head_size


@dataclass(frozen=True)
class Prefill:
    """Several new tokens of one sequence.

    The decoding kernel can't take more than one.

    Attributes:
        rows: their rows in the step's tensors.
        start, stop: their positions.
        pages, offsets: where each is written: int64 [tokens, H] and [tokens, 1].
        read: blocks before `stop` that they may read: KV heads, blocks, pages, int64 [3, n].
    """

    rows: slice
    start: int
    stop: int
    pages: Tensor
    offsets: Tensor
    read: Tensor


@dataclass(frozen=True)
class S2Metadata(AttentionMetadata):
    """One step's sequences; those with one new token come first.

    Attributes:
        table: int32 [decodes, H, blocks]: the page of each key block.
        positions: int32 [decodes]; -1 without a token.
    """

    table: Tensor
    positions: Tensor
    prefills: Sequence[Prefill]


class S2MetadataBuilder(AttentionMetadataBuilder[S2Metadata]):
    """Reads page tables once a step for all layers of a group.

    Our kernels count pages of one KV head's block: where c KV heads share vLLM's page p, it is pages 2cp to 2cp + c - 1
    of keys and the next c of values.

    A CUDA graph of decoding is replayed with other contents of the same tensors. So a step without prefills fills
    tensors that are allocated once, and the host reads nothing from the device.
    """

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, S2Spec)
        self._init_reorder_batch_threshold(1)
        self._block, self._slots = kv_cache_spec.layout_block, len(kv_cache_spec.slots)
        self._shared = kv_cache_spec.num_kv_heads // self._slots  # KV heads of a page
        self._uses = np.repeat(kv_cache_spec.last_uses(), self._shared, axis=1)  # [blocks, H]
        batch, (blocks, heads) = vllm_config.scheduler_config.max_num_seqs, self._uses.shape
        self._within = torch.arange(self._shared, dtype=torch.int32, device=device)[:, None]
        self._table = torch.zeros(batch, heads, blocks, dtype=torch.int32, device=device)
        self._positions = torch.full((batch,), -1, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> S2Metadata:
        common = common_attn_metadata
        decodes, prefills, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
        self._table[:decodes] = self._pages(common.block_table_tensor[:decodes])
        self._positions[:decodes] = common.seq_lens[:decodes] - 1
        found = []
        if prefills:
            bounds = common.query_start_loc_cpu.tolist()
            known = common.seq_lens_cpu_upper_bound
            lengths = (common.seq_lens if known is None else known).tolist()
            for number in range(decodes, decodes + prefills):
                rows = slice(bounds[number], bounds[number + 1])
                if rows.stop > rows.start:
                    pages = self._pages(common.block_table_tensor[number : number + 1])[0]
                    found.append(self._prefill(rows, lengths[number], pages))
        return S2Metadata(self._table[:decodes], self._positions[:decodes], found)

    def _pages(self, entries: Tensor) -> Tensor:
        """Return the page of each KV head's block.

        Page tables are [b, entries]; the result is [b, H, blocks].
        """
        blocks = len(self._uses)
        missing = blocks * self._slots - entries.shape[1]
        if missing > 0:  # the last block is partial, and vLLM made no room for all of it
            entries = torch.nn.functional.pad(entries, (0, missing))
        pages = entries[:, : blocks * self._slots].view(-1, blocks, self._slots).transpose(1, 2)
        return (pages[:, :, None] * (2 * self._shared) + self._within).flatten(1, 2)

    def _prefill(self, rows: slice, stop: int, pages: Tensor) -> Prefill:
        start, device = stop - (rows.stop - rows.start), pages.device
        position = torch.arange(start, stop, device=device)
        # What later queries than the first may read is a bit more than these read, and known on the host.
        read = self._uses[: -(-stop // self._block)] >= start // self._block
        index = torch.from_numpy(np.stack(read.T.nonzero())).to(device, non_blocking=True)
        return Prefill(
            rows,
            start,
            stop,
            pages[:, position // self._block].T.long(),
            (position % self._block)[:, None],
            torch.cat([index, pages[index[0], index[1]].long()[None]]),
        )


class S2Attention(AttentionImpl[S2Metadata]):
    """Attention of one sparse layer.

    Args:
        heads: patterns of this rank's query heads.
        block_size: tokens of a layout's block.
        max_length: tokens of the longest sequence.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        heads: tuple[Pattern, ...],
        block_size: int,
        max_length: int,
    ) -> None:
        assert num_kv_heads is not None
        assert alibi_slopes is None
        assert sliding_window is None
        assert not logits_soft_cap
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads, head_size, scale
        self.kv_cache_dtype = kv_cache_dtype
        self._heads, self._block, self._max_length = heads, block_size, max_length
        self._layout: BlockLayout | None = None
        self._is_compiled = False

    def build_layout(self, device: torch.device) -> None:
        """Build what the kernels read of the layout.

        The host waits for the device meanwhile, which no CUDA graph can capture.
        """
        self._layout = kernel_layout(self._heads, self._block, self._max_length, device)
        decode_schedule(self._layout, self.num_kv_heads)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: S2Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write new keys and values to their pages, and attend.

        Args:
            query, output: [tokens, heads, d].
            key, value: [tokens, H, d].
            kv_cache: [vLLM's pages, 2, tokens of a KV head, d].
        """
        layout = self._layout
        assert layout is not None
        if attn_metadata is None:  # vLLM measures how much memory a step takes, before any request
            blocks = -(-self._max_length // self._block)
            gathered = self._gathered(blocks, key)
            if key.is_cuda and not self._is_compiled:
                self._is_compiled = True
                compile_kernels(query, key, value, gathered.flatten(2, 3), layout, blocks, self.scale)
            return output.fill_(0)
        pages, shared = kv_cache.view(-1, self._block, self.head_size), kv_cache.shape[2] // self._block
        keys, values = pages[:-shared], pages[shared:]
        # All keys before any query: a request may find pages in the prefix cache that another fills in this step.
        for prefill in attn_metadata.prefills:
            keys[prefill.pages, prefill.offsets] = key[prefill.rows]
            values[prefill.pages, prefill.offsets] = value[prefill.rows]
        decodes = len(attn_metadata.positions)
        if decodes:
            table, positions = attn_metadata.table, attn_metadata.positions
            append_token(key[:decodes], value[:decodes], keys, values, table, positions)
            output[:decodes], _ = block_sparse_decode(
                query[:decodes], keys, values, table, positions, layout, softmax_scale=self.scale
            )
        for prefill in attn_metadata.prefills:
            self._prefill(prefill, query, key, value, keys, values, layout, output)
        return output

    def _prefill(
        self,
        prefill: Prefill,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        layout: BlockLayout,
        output: Tensor,
    ) -> None:
        new_keys, new_values = key[prefill.rows], value[prefill.rows]
        if prefill.start > 0:
            head, block, page = prefill.read
            both = self._gathered(-(-prefill.stop // self._block), key)
            both[0, head, block], both[1, head, block] = keys[page], values[page]
            flat = both.flatten(2, 3)[:, :, : prefill.stop]  # [2, H, tokens, d]
            new_keys, new_values = flat.transpose(1, 2)
        output[prefill.rows] = block_sparse_attention(
            query[prefill.rows][:, None],
            new_keys[:, None],
            new_values[:, None],
            layout,
            softmax_scale=self.scale,
            query_offset=prefill.start,
        )[:, 0]

    def _gathered(self, blocks: int, like: Tensor) -> Tensor:
        """Allocate keys and values of one sequence in a row.

        The result is [2, H, blocks, B, d]; what isn't read stays 0.
        """
        shape = (2, self.num_kv_heads, blocks, self._block, self.head_size)
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


@cache
def kernel_layout(heads: tuple[Pattern, ...], block_size: int, max_length: int, device: torch.device) -> BlockLayout:
    """Build the kernels' layout of a layer's heads.

    Layers with equal heads share it.
    """
    return layer_layout(heads, block_size).block_layout(max_length, device=device)
