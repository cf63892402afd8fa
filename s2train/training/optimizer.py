"""Builds Megatron's data parallel wrapper, optimizer and learning-rate schedule."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from s2train.config import OptimConfig, PretrainConfig
from s2train.environment.dtypes import DTYPES
from s2train.megatron.clipping import clip, replace_stand_ins, squared_norm
from s2train.megatron.kind_weights import GAIN
from s2train.megatron.local_optimizer_state import load_only_local_state
from s2train.megatron.optimizer_state import prepare_to_load
from s2train.megatron.optimizer_views import keep_views
from s2train.megatron.torch_adam import fuse_on_gpus, prepare_for_checkpoints
from s2train.training.frozen_trunk import LearningRateSchedule


def wrap_data_parallel(
    cfg: PretrainConfig, config: TransformerConfig, chunks: list[MegatronModule]
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP, with gradients in fp32."""
    overlap = cfg.parallel.overlap_grad_reduce and _num_shards() > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=_overlaps_param_gather(cfg),
    )
    wrapped = [
        # Gradients of later chunks are ready first, so only those of the first chunk are worth splitting into buckets.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return wrapped


def build_optimizer(
    cfg: PretrainConfig,
    config: TransformerConfig,
    chunks: list[DistributedDataParallel],
    *,
    decays_gains: bool = False,
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """Build the chunks' optimizer and its learning-rate schedule, counted in steps.

    Args:
        decays_gains: `s2train.checkpoints.folders.Progress.decays_gains`.
    """
    optim = cfg.optim
    replace_stand_ins()
    settings = OptimizerConfig(
        optimizer=optim.name,
        lr=optim.lr,
        min_lr=optim.lowest_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.bf16,
        params_dtype=DTYPES[cfg.train.precision],
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_param_gather=_overlaps_param_gather(cfg),
        **optimizer_options(cfg),
        **_offload(optim),
    )
    groups = get_standard_config_overrides(settings)  # what has one dimension does not decay
    if not decays_gains:
        groups[ParamKey(attr=GAIN)] = ParamGroupOverride(wd_mult=0.0)
    optimizer = get_megatron_optimizer(settings, chunks, groups)
    prepare_to_load(optimizer)
    fuse_on_gpus(optimizer)
    prepare_for_checkpoints(optimizer)
    load_only_local_state(optimizer)
    keep_views(optimizer)
    config.grad_scale_func = optimizer.scale_loss
    decay_steps = optim.decay_steps or cfg.train.steps
    scheduler = LearningRateSchedule(
        optimizer,
        frozen=cfg.train.freeze_trunk_steps,
        second_warmup=optim.second_warmup_steps,
        init_lr=0.0,
        # Megatron reads these two only where a parameter group has none, and groups of this optimizer have them.
        max_lr=optim.lr,
        min_lr=optim.lowest_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=optim.decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        wsd_decay_steps=optim.wsd_decay_steps,
        lr_wsd_decay_style="linear" if optim.decay_style == "WSD" else None,
        # A resumed run follows the learning-rate schedule of its settings from the checkpoint's step on.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def optimizer_options(cfg: PretrainConfig) -> dict[str, Any]:
    """Return `optim.options`, with which Muon's update doesn't depend on `parallel.tp`.

    By Megatron's default each tensor parallel rank orthogonalizes its part of a matrix, not the matrix.
    """
    own = {"muon_tp_mode": "duplicated"} if cfg.optim.name == "muon" and cfg.parallel.tp > 1 else {}
    return own | cfg.optim.options


def _offload(optim: OptimConfig) -> dict[str, Any]:
    """Return Megatron's settings of an optimizer partly in host memory."""
    if not optim.cpu_offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": optim.cpu_offload,
        # Megatron's training program demands it: the hybrid optimizer uses its gradients.
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def squared_gradient_norm(optimizer: MegatronOptimizer) -> torch.Tensor:
    """Square of the whole gradient's norm before clipping, fp32 [1].

    Collective; the same on every rank. Prepares the gradients for `take_step`. Does not wait for the GPU.
    """
    optimizer.prepare_grads()
    return squared_norm(optimizer)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Norm of the whole gradient before clipping, the same on every rank.

    Collective. Prepares the gradients for `take_step`.
    """
    return float(squared_gradient_norm(optimizer)) ** 0.5


def take_step(optimizer: MegatronOptimizer, norm: float, share: float = 1.0) -> None:
    """Clip the prepared gradients of this norm, and step.

    Megatron's own step would prepare the gradients and compute their norm a second time.

    Args:
        share: share of the batch's tokens that count in the loss: the gradients, of the loss over all tokens, are
            divided by it. `norm` is that of the quotient.
    """
    clip(optimizer, norm, share)
    optimizer.step_with_ready_grads()


@contextlib.contextmanager
def up_to_date_parameters(cfg: PretrainConfig, chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Bring the parameters up to date for use outside training.

    With an overlapped parameter gather they are stale between steps.
    """
    if not _overlaps_param_gather(cfg):
        yield
        return
    for chunk in chunks:
        chunk.disable_forward_pre_hook()
    yield
    for chunk in chunks:
        chunk.enable_forward_pre_hook()


def _overlaps_param_gather(cfg: PretrainConfig) -> bool:
    parallel = cfg.parallel
    return (
        parallel.distributed_optimizer
        and parallel.overlap_param_gather
        and parallel.overlap_grad_reduce  # Megatron accepts both or neither
        and _num_shards() > 1
    )


def _num_shards() -> int:
    return torch.distributed.get_world_size(group=parallel_state.get_data_parallel_group(with_context_parallel=True))
