"""Build this rank's chunks of a configured GPTModel."""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import ModuleList

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.exchange import exchange_mode
from s2train.costs.stages import Stages
from s2train.environment.dtypes import DTYPES
from s2train.environment.liger import INSTALL, choose_loss, liger_problem
from s2train.environment.transformer_engine import uses_te_here
from s2train.errors import ConfigError
from s2train.megatron.block_attention import DenseCoreAttention
from s2train.megatron.gradient_sums import replace_apex
from s2train.megatron.initial_weights import draw_initial_weights
from s2train.megatron.layer_backends import Backend, choose_backend, own_capability
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.overlapped_linear import overlap_communication
from s2train.megatron.peer_exchange import tensor_parallel_exchange
from s2train.megatron.rope_scaling import scale_rotation, set_temperature
from s2train.megatron.specs import CoreSettings, block_spec

# Megatron's names of `train.recompute`.
_GRANULARITY = {"none": None, "selective": "selective", "mlp": "selective", "full": "full"}
_RECOMPUTED = {"selective": ["core_attn"], "mlp": ["mlp"]}


def transformer_config(cfg: PretrainConfig, stages: Stages | None = None) -> TransformerConfig:
    """Make Megatron's configuration of a Llama-like model for the current device.

    Args:
        stages: layers of each pipeline stage; None: the same number on each.
    Raises:
        ConfigError: the backend is not installed.
    """
    model, parallel, train = cfg.model, cfg.parallel, cfg.train
    dtype, on_cuda = DTYPES[train.precision], torch.cuda.is_available()
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        init_method_std=model.init_std,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp,
        pipeline_model_parallel_layout=None if stages is None else stages.megatron_layout(),
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=train.precision == "bf16",
        recompute_granularity=_GRANULARITY[train.recompute],
        recompute_modules=_RECOMPUTED.get(train.recompute),
        recompute_method="uniform" if train.recompute == "full" else None,
        recompute_num_layers=train.recompute_num_layers if train.recompute == "full" else None,
        # On a CPU parameters are drawn there, since the CUDA generator is replaced by the CPU's.
        use_cpu_initialization=not on_cuda,
        batch_p2p_comm=on_cuda,
        # If gloo is still sending outputs while they are freed, results are silently wrong.
        deallocate_pipeline_outputs=on_cuda,
        # Compiled by torch on a GPU; not faster on a CPU.
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=False,
        # Would round the logits' gradient to bf16 in any precision.
        cross_entropy_loss_fusion=on_cuda and train.precision == "bf16",
        apply_rope_fusion=choose_backend(cfg.layer_backend).fuses_rotation,
        fp8=None if cfg.fp8 == "none" else cfg.fp8,
        fp8_recipe=cfg.fp8_recipe,
        # Add weight gradients to the fp32 buffers within the product. torch can't on a CPU.
        gradient_accumulation_fusion=on_cuda,
        # For layers that we don't use.
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=train.deterministic,
    )
    set_temperature(config, model)
    return config


def build_model(
    cfg: PretrainConfig,
    config: TransformerConfig,
    hybrid: HybridLayout,
    backend: Backend,
    device: torch.device,
    *,
    with_head: bool = True,
) -> list[MegatronModule]:
    """Build this rank's model chunks on `device`, in the run's precision.

    There is one chunk per virtual pipeline stage. A chunk takes (tokens [b, s / cp], position_ids [b, s / cp], None,
    labels=…) and returns per-token losses [b, s / cp] in fp32, or without labels logits [b, s / cp, vocab / tp].
    Initial weights depend only on `cfg.seed`, not on the parallel division.

    Args:
        with_head: if off, the last chunk ends with its last layer, and returns hidden states.
    """
    if config.gradient_accumulation_fusion:
        replace_apex()
    core = CoreSettings(hybrid.num_query_groups, LayoutCache(), cfg.attention_backend, cfg.seed)
    make_model, scaling = model_class(cfg), cfg.model.rope_scaling
    exchanges = [
        exchange_mode(layer, hybrid.num_query_groups, cfg.train.seq_length, cfg.parallel) for layer in hybrid.layers
    ]
    built: list[GPTModel] = []
    stages: list[int | None] = [None] if cfg.parallel.vpp is None else list(range(cfg.parallel.vpp))
    for stage in stages:
        where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
        chunk = make_model(
            config=config,
            transformer_layer_spec=block_spec(config, hybrid, backend, core, exchanges, stage),
            vocab_size=cfg.model.vocab_size,
            max_sequence_length=cfg.train.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=with_head and parallel_state.is_pipeline_last_stage(**where),
            position_embedding_type="rope",
            rotary_base=cfg.model.rotary_base,
            rotary_percent=cfg.model.rotary_percent,
            seq_len_interpolation_factor=scaling.factor if scaling.kind == "linear" else None,
            share_embeddings_and_output_weights=cfg.model.tie_embeddings,
            vp_stage=stage,
        )
        scale_rotation(chunk, cfg.model)
        chunk.model_type = ModelType.encoder_or_decoder
        for module in chunk.modules():
            if isinstance(module, DenseCoreAttention):
                module.implementation = cfg.dense_attention
        if backend.fuses_sums:
            from s2train.megatron.summed_norm import fuse_sums  # not importable where Liger-Kernel is not installed

            fuse_sums(chunk.decoder)
        built.append(chunk.to(device))
    exchange = tensor_parallel_exchange(cfg, device)
    if exchange is not None:
        overlap_communication(ModuleList(built), exchange)
    if config.perform_initialization:
        draw_initial_weights(cfg.model, config, cfg.seed, built, device)
    return [Float16Module(config, chunk) if config.bf16 else chunk for chunk in built]


def model_class(cfg: PretrainConfig) -> Callable[..., GPTModel]:
    """Return the GPTModel class for the run's `loss` on this device.

    Returns Megatron's class, or ours with another loss.
    """
    loss = choose_loss(cfg, own_capability(), uses_te_here(cfg.layer_backend))
    if loss == "torch":
        return GPTModel
    if (problem := liger_problem()) is not None:
        raise ConfigError("loss", loss, problem, f"{INSTALL}, or set loss=torch")
    from s2train.megatron.fused import LigerLossModel  # not importable where Liger-Kernel is not installed

    return partial(LigerLossModel, fuse_output=loss == "linear", in_place=loss == "in_place")


def unwrap(module: torch.nn.Module) -> GPTModel:
    """Return the GPTModel inside data-parallel and precision wrappers."""
    while not isinstance(module, GPTModel):
        module = module.get_submodule("module")
    return module
