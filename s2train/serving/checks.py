"""Reject what can't be served, before vLLM starts a worker."""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from s2train.errors import ConfigError
from s2train.serving.export_layout import ExportLayout
from s2train.serving.pages import PagePlan
from s2train.serving.versions import warn_of_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_PAGE_TOKENS = "s2train_page_tokens"  # in VllmConfig.additional_config: of a dense layer's page
_ALIGNMENT = 128  # vLLM's page tables have room for a multiple of so many tokens


class ServingChecks:
    """Checks of an export, which vLLM calls.

    They run in the process that reads the command line.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Do nothing: the checks need the whole configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the settings, and set the page size.

        Raises:
            ConfigError: a setting or an export that can't be served.
        """
        warn_of_version()
        check(vllm_config)
        layout, cache_config = read_layout(vllm_config), vllm_config.cache_config
        chosen = cache_config.block_size if cache_config.user_specified_block_size else None
        plan = PagePlan.choose(layout.block_size, _local_kv_heads(vllm_config, layout), chosen)
        cache_config.block_size = plan.dense_tokens
        cache_config.user_specified_block_size = True  # else vLLM's platforms and backends set their own
        vllm_config.additional_config = {**vllm_config.additional_config, _PAGE_TOKENS: plan.dense_tokens}


def check(config: VllmConfig) -> None:
    """Raise ConfigError for the first setting that sparse layers can't have."""
    layout, parallel, kv_cache = read_layout(config), config.parallel_config, config.cache_config
    if (layers := config.model_config.hf_config.num_hidden_layers) != len(layout.layers):
        problem = f"the export has the layouts of {len(layout.layers)} layers"
        remedy = "Leave num_hidden_layers out of --hf-overrides, or export a model of so many layers"
        raise ConfigError("hf_overrides.num_hidden_layers", layers, problem, remedy)
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    for setting, size in sizes.items():
        if size > 1:
            remedy = "Set it to 1, and use --tensor-parallel-size"
            raise ConfigError(setting, size, "sparse layers are divided by tensor parallel only", remedy)
    _local_kv_heads(config, layout)
    if config.speculative_config is not None:
        problem = "sparse layers decode one token of a sequence at a time"
        raise ConfigError("speculative_config", config.speculative_config.method, problem, "Leave it out")
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if kv_cache.cache_dtype not in ("auto", dtype):
        problem = f"sparse layers keep keys and values in the model's dtype, {dtype}"
        raise ConfigError("kv_cache_dtype", kv_cache.cache_dtype, problem, "Leave --kv-cache-dtype out")
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        problem = "without it vLLM frees no page before its sequence ends"
        remedy = "Leave --disable-hybrid-kv-cache-manager out"
        raise ConfigError("disable_hybrid_kv_cache_manager", True, problem, remedy)
    if kv_cache.kv_offloading_size is not None:  # vLLM makes a kv_transfer_config of it after these checks
        problem = "pages of sparse layers can't be sent or reported elsewhere"
        raise ConfigError("kv_offloading_size", kv_cache.kv_offloading_size, problem, "Leave it out")
    for setting, found in (("kv_transfer_config", config.kv_transfer_config), ("kv_events_config", _events(config))):
        if found is not None:
            problem = "pages of sparse layers can't be sent or reported elsewhere"
            raise ConfigError(setting, type(found).__name__, problem, "Leave it out")
    length = config.model_config.max_model_len
    if layout.longest is not None and length > layout.longest:
        problem = f"the layout's masks end at {layout.longest} tokens"
        raise ConfigError("max_model_len", length, problem, f"Set --max-model-len {layout.longest} or less")
    if layout.block_size > _ALIGNMENT and config.model_config.original_max_model_len == -1:
        problem = f"vLLM may choose a length that isn't a multiple of the layout's block of {layout.block_size}"
        raise ConfigError("max_model_len", "auto", problem, f"Set --max-model-len to a multiple of {layout.block_size}")
    if layout.block_size > _ALIGNMENT and length % layout.block_size:
        problem = f"isn't a multiple of the layout's block of {layout.block_size}"
        remedy = f"Set --max-model-len {length // layout.block_size * layout.block_size}"
        raise ConfigError("max_model_len", length, problem, remedy)


def read_layout(config: VllmConfig) -> ExportLayout:
    """Return the layout of the export that is served."""
    hf_config = config.model_config.hf_config
    heads = {name: getattr(hf_config, name) for name in ("num_attention_heads", "num_key_value_heads")}
    return _read(json.dumps({"layout": hf_config.layout, **heads}), config.model_config.model)


@cache
def _read(config: str, name: str) -> ExportLayout:
    return ExportLayout.read(json.loads(config), name)


def page_plan(config: VllmConfig) -> PagePlan:
    """Return the pages that `ServingChecks` chose."""
    layout = read_layout(config)
    return PagePlan(layout.block_size, _local_kv_heads(config, layout), config.additional_config[_PAGE_TOKENS])


def _local_kv_heads(config: VllmConfig, layout: ExportLayout) -> int:
    tp = config.parallel_config.tensor_parallel_size
    if layout.num_kv_heads % tp:
        divisors = [n for n in range(1, layout.num_kv_heads + 1) if layout.num_kv_heads % n == 0]
        problem = f"doesn't divide the model's {layout.num_kv_heads} KV heads"
        raise ConfigError("tensor_parallel_size", tp, problem, f"Set it to one of {', '.join(map(str, divisors))}")
    return layout.num_kv_heads // tp


def _events(config: VllmConfig) -> Any:
    events = config.kv_events_config
    return events if events is not None and events.enable_kv_cache_events else None
