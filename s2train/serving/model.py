"""An export's model in vLLM.

It is vLLM's Llama, with our attention in sparse layers.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from s2train.errors import ConfigError
from s2train.serving.backend import S2Backend
from s2train.serving.checks import page_plan, read_layout
from s2train.serving.freeing import held_pages, slots_of
from s2train.serving.kv_cache import S2Spec
from s2train.serving.rotation import rope_parameters

logger = init_logger("vllm.s2train")  # vLLM prints only its own loggers' lines


class SparseAttention(Attention):
    """Attention of a sparse layer, with all KV heads in one call.

    Each KV head has separate pages.
    """

    def __init__(self, *arguments: Any, layer: int, **settings: Any) -> None:
        config = get_current_vllm_config()
        layout, plan = read_layout(config), page_plan(config)
        tp, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        heads = layout.layers[layer]
        local = len(heads) // tp
        super().__init__(
            *arguments,
            attn_backend=S2Backend,
            heads=heads[rank * local : (rank + 1) * local],
            block_size=layout.block_size,
            max_length=config.model_config.max_model_len,
            **settings,
        )
        self._block, self._plan = layout.block_size, plan
        self._slots = slots_of(heads, plan.num_kv_heads, plan.heads_per_page, tp)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        # Here, so that vLLM counts the layout's memory with the weights'.
        self.impl.build_layout(torch.device(current_platform.device_type))

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return S2Spec(
            block_size=self._plan.page_tokens,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            layout_block=self._block,
            slots=self._slots,
            max_length=vllm_config.model_config.max_model_len,
            tokens_per_step=vllm_config.scheduler_config.max_num_batched_tokens,
        )


class DenseAttention(Attention):
    """Attention of some KV heads of a dense layer.

    vLLM's backend computes it, in pages as large as a sparse layer's.
    """

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        spec = super().get_kv_cache_spec(vllm_config)
        assert isinstance(spec, FullAttentionSpec)
        return dataclasses.replace(spec, block_size=page_plan(vllm_config).dense_tokens)

    def get_attn_backend(self) -> type[AttentionBackend]:
        if (name := self.attn_backend.get_name()) == "FLASHINFER":
            problem = "its plan is for all heads of a rank, and an export's dense layers have groups of heads"
            raise ConfigError("attention_backend", name, problem, "Set --attention-backend FLASH_ATTN")
        return _backend_of_spec(self.attn_backend, self.num_heads)


@cache
def _backend_of_spec(backend: type[AttentionBackend], num_heads: int) -> type[AttentionBackend]:
    """Return a backend whose metadata are for the spec's KV heads.

    vLLM's metadata are for the KV heads of the whole model.
    """
    builder: Any = backend.get_builder_cls()

    class Builder(builder):
        # In a CUDA graph each group of layers reads its own buffer of scheduler metadata, which vLLM would then fill
        # for the first group only.
        supports_update_block_table = False

        def __init__(self, spec: AttentionSpec, layers: list[str], config: VllmConfig, device: torch.device) -> None:
            super().__init__(spec, layers, config, device)
            found = {
                "num_kv_heads": spec.num_kv_heads,
                "num_heads_kv": spec.num_kv_heads,
                "block_size": spec.block_size,
            }
            for name, value in (found | {"num_heads": num_heads, "num_heads_q": num_heads}).items():
                if hasattr(self, name):
                    setattr(self, name, value)

    return subclass_attention_backend("S2Dense", backend, Builder)


class S2SelfAttention(nn.Module):
    """Projections, rotation and attention of one layer; its arguments are LlamaAttention's."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None = None,
        cache_config: CacheConfig | None = None,
        prefix: str = "",
        **_: Any,
    ) -> None:
        super().__init__()
        vllm_config, tp = get_current_vllm_config(), get_tensor_model_parallel_world_size()
        layer, layout, plan = extract_layer_index(prefix), read_layout(vllm_config), page_plan(vllm_config)
        head_dim = config.head_dim or hidden_size // num_heads
        heads, kv_heads = num_heads // tp, num_kv_heads // tp
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        common = {"bias": False, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(
            hidden_size, head_dim, num_heads, num_kv_heads, prefix=f"{prefix}.qkv_proj", **common
        )
        self.o_proj = RowParallelLinear(num_heads * head_dim, hidden_size, prefix=f"{prefix}.o_proj", **common)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(head_dim, eps=config.rms_norm_eps) for _ in "qk")
        rotation = rope_parameters(config)
        self.rotary_emb = get_rope(head_dim, max_position=max_position_embeddings, rope_parameters=rotation)
        settings = {"cache_config": cache_config, "quant_config": quant_config}
        scale = head_dim**-0.5
        if layout.is_dense(layer):
            parts = kv_heads // plan.dense_heads
            names = [f"{prefix}.attn"] if parts == 1 else [f"{prefix}.attn_{part}" for part in range(parts)]
            self.attn = nn.ModuleList(
                DenseAttention(heads // parts, head_dim, scale, plan.dense_heads, prefix=name, **settings)
                for name in names
            )
        else:
            name = f"{prefix}.attn"
            self.attn = nn.ModuleList(
                [SparseAttention(heads, head_dim, scale, kv_heads, prefix=name, layer=layer, **settings)]
            )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.q_norm is not None:
            q, k = _by_head(self.q_norm, q), _by_head(self.k_norm, k)
        q, k = self.rotary_emb(positions, q, k)
        parts = len(self.attn)
        if parts == 1:
            out = self.attn[0](q, k, v)
        else:
            chunks = zip(self.attn, *(x.chunk(parts, dim=-1) for x in (q, k, v)), strict=True)
            out = torch.cat([attn(*(x.contiguous() for x in qkv)) for attn, *qkv in chunks], dim=-1)
        return self.o_proj(out)[0]


def _by_head(norm: RMSNorm, x: Tensor) -> Tensor:
    """Normalize each head of [tokens, heads · d]."""
    normalized: Tensor = norm(x.unflatten(-1, (-1, norm.hidden_size)).contiguous())
    return normalized.flatten(-2)


class S2DecoderLayer(LlamaDecoderLayer):
    """A Llama's layer with our attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=S2SelfAttention)


class S2ForCausalLM(LlamaForCausalLM):
    """The model that vLLM builds for `architectures: [S2ForCausalLM]`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=S2DecoderLayer)
        if get_tensor_model_parallel_rank() == 0:
            logger.info(freed_pages(vllm_config, [m for m in self.modules() if isinstance(m, SparseAttention)]))


def freed_pages(config: VllmConfig, sparse: list[SparseAttention]) -> str:
    """Say how many pages of sparse layers a sequence holds.

    The sequence has the maximum length.
    """
    tokens = config.model_config.max_model_len
    if not sparse:
        return "s2train: no sparse layer, so no page is freed before its sequence ends"
    specs = [attention.get_kv_cache_spec(config) for attention in sparse]
    uses = [spec.last_uses() for spec in specs if isinstance(spec, S2Spec)]
    held = sum(int(held_pages(one)[:-1].max()) + one.shape[1] for one in uses)
    all_pages = sum(one.size for one in uses)
    shared = sparse[0].num_kv_heads // uses[0].shape[1]
    of = "each KV head" if shared == 1 else f"every {shared} KV heads"
    return (
        f"s2train: pages are freed for {of}: a sequence of {tokens:,} tokens holds at most {held:,} of {all_pages:,} "
        f"pages of its {len(uses)} sparse layers ({held / all_pages:.1%})"
    )
