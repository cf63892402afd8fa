"""Refusing a run that can't work, before anything is allocated: one error with setting, value and remedy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from s2train.config import PretrainConfig, to_object
from s2train.costs.memory import GIB
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.layouts.hybrid import HybridLayout, build_hybrid_layout
from s2train.planning.plan import Plan, make_plan
from s2train.validation.division import check_division, multiple_of, smallest_world
from s2train.validation.libraries import check_fa4_serves, check_kernel_settings, check_libraries
from s2train.validation.transformer_engine import check_target, check_te
from s2train.validation.values import check_values


def resolve(cfg: DictConfig, models: Sequence[str]) -> Any:
    """A program's composed configuration as its dataclass; `models` are the names that `+model=` may have.

    A run's lowest learning rate is filled in as `optim.min_lr`, so that saved settings tell it.

    Raises:
        ConfigError: no model was named, or a setting has no value.
    """
    if OmegaConf.is_missing(cfg, "model"):
        names = ", ".join(models)
        raise ConfigError("+model", "(not set)", "no model was named", f"Add +model=NAME; there are {names}.")
    resolved = to_object(cfg)
    if isinstance(resolved, PretrainConfig):
        resolved.optim.min_lr = resolved.optim.lowest_lr
    return resolved


def check(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> Plan:
    """The plan of a run that can start on `world_size` ranks like `hardware`.

    Raises:
        ConfigError: a setting is out of its range, two don't divide, blocks go unseen, or memory is short.
    """
    check_values(cfg)
    check_documents(cfg)
    check_division(cfg, world_size)
    _check_profiled_ranks(cfg, world_size)
    check_attention_backend(cfg.attention_backend, hardware)
    check_te(cfg, hardware)
    hybrid = _hybrid(cfg)
    check_libraries(cfg, hybrid, hardware)
    plan = make_plan(cfg, hybrid, world_size, hardware)
    check_memory(plan)
    return plan


def check_memory(plan: Plan) -> None:
    """Whether a plan fits its device.

    Raises:
        ConfigError: memory is short; names what takes it, and what would fit.
    """
    if plan.remedy is not None:
        raise ConfigError(*_shortage(plan), plan.remedy)


def _check_profiled_ranks(cfg: PretrainConfig, world_size: int) -> None:
    if cfg.profile.steps is None:
        return
    if beyond := [rank for rank in cfg.profile.ranks if rank >= world_size]:
        problem = f"there {'is 1 rank' if world_size == 1 else f'are {world_size} ranks'}, and no rank {beyond[0]}"
        kept = [rank for rank in cfg.profile.ranks if rank < world_size] or [0]
        raise ConfigError("profile.ranks", cfg.profile.ranks, problem, f"Set profile.ranks={kept}.")


def check_documents(cfg: PretrainConfig) -> None:
    """Whether attention can be kept inside documents, where that is asked for.

    Raises:
        ConfigError: context parallel, which cuts documents apart.
    """
    if cfg.data.attention_within_documents and cfg.parallel.cp > 1:
        problem = f"parallel.cp={cfg.parallel.cp} spreads a sequence over ranks, and documents with it"
        remedy = "Set parallel.cp=1, or data.attention_within_documents=false."
        raise ConfigError("data.attention_within_documents", True, problem, remedy)


def check_attention_backend(name: str, hardware: Hardware) -> None:
    """Whether a backend of the attention op can run on `hardware`.

    Raises:
        ConfigError: Triton without CUDA.
    """
    if name in ("triton", "portable") and hardware.kind == "cpu":
        raise ConfigError("attention_backend", name, "there is no CUDA device", "Set attention_backend=auto.")


def preview(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> Plan:
    """The plan to print, fitting or not; of more ranks where `world_size` can't hold the model once.

    Raises:
        ConfigError: as `check`, but for memory and the number of ranks.
    """
    check_values(cfg)
    check_documents(cfg)
    if cfg.plan.device is not None:
        check_target(cfg, hardware)
    copy = smallest_world(cfg)
    ranks = copy if world_size % copy else world_size
    if hardware.kind == "cpu":  # they would share what the ranks here have
        hardware = replace(hardware, memory=hardware.memory * world_size // ranks)
    check_division(cfg, ranks)
    hybrid = _hybrid(cfg)
    if cfg.plan.device is not None:
        check_fa4_serves(cfg, hybrid, hardware)
    return make_plan(cfg, hybrid, ranks, hardware)


def _hybrid(cfg: PretrainConfig) -> HybridLayout:
    """The layout, which goes with the sequence and with the kernels that the settings name."""
    hybrid = hybrid_layout(cfg)
    check_blocks(cfg, hybrid)
    check_kernel_settings(cfg, hybrid)
    return hybrid


def hybrid_layout(cfg: PretrainConfig) -> HybridLayout:
    """What every head of every layer of a run's model keeps.

    Raises:
        ConfigError: layout or schedule don't go with the model's layers and heads.
    """
    model = cfg.model
    return build_hybrid_layout(
        cfg.layout,
        cfg.schedule,
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
    )


def check_blocks(cfg: PretrainConfig, hybrid: HybridLayout) -> None:
    """Whether the sequence can be cut into blocks, where there are sparse layers.

    Raises:
        ConfigError: the sequence is shorter than a block, or context parallel cuts one.
    """
    block, length, cp = cfg.layout.block_size, cfg.train.seq_length, cfg.parallel.cp
    if all(layer.is_dense for layer in hybrid.layers):
        return
    if length < block:
        raise ConfigError(
            "train.seq_length",
            length,
            f"a sequence shorter than a block of {block} tokens",
            f"Set train.seq_length to {block} or more, or layout.block_size to {length} or less.",
        )
    if cp > 1 and length % (2 * cp * block):
        raise ConfigError(
            "train.seq_length",
            length,
            f"parallel.cp={cp} cuts it into {2 * cp} chunks, which must be whole blocks of {block}",
            multiple_of("train.seq_length", length, 2 * cp * block),
        )


def _shortage(plan: Plan) -> tuple[str, object, str]:
    """The setting behind the largest part of a plan that does not fit, and the problem in numbers."""
    memory, train, device = plan.memory, plan.cfg.train, plan.hardware
    states = memory.weights + memory.gradients + memory.optimizer
    room = "its share of this machine's RAM is" if device.kind == "cpu" else f"{device.name} has"
    micro_batch = f"{train.micro_batch_size} × {train.seq_length:,} tokens"
    problem = (
        f"{plan.cfg.model.name} needs {memory.total / GIB:.1f} GiB on each process, "
        f"{states / GIB:.1f} of it weights, gradients and optimizer, "
        f"{memory.activations / GIB:.1f} activations of {micro_batch}, "
        f"and {room} {device.memory / GIB:.1f}"
    )
    if states > memory.activations:
        return "+model", plan.cfg.model.name, problem
    return "train.micro_batch_size", train.micro_batch_size, problem
