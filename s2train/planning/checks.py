"""Rejects a run that can't work, before anything is allocated.

The error names the setting, its value and a remedy.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from s2train.attention.hybrid import HybridLayout
from s2train.command_line.budgets import steps_given
from s2train.command_line.group_values import no_model
from s2train.config import PretrainConfig, to_object
from s2train.costs.memory import GIB
from s2train.data.parts import check_parts
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning.plan import Plan, make_plan
from s2train.planning.run_layout import hybrid_layout
from s2train.planning.targets import planned_for
from s2train.validation.attention_kinds import check_kinds
from s2train.validation.division import check_division, multiple_of, smallest_world
from s2train.validation.libraries import check_fa4_serves, check_kernel_settings, check_libraries
from s2train.validation.optimizers import check_offload, check_optimizer, check_options
from s2train.validation.overlap import check_overlap
from s2train.validation.token_budgets import derive_steps
from s2train.validation.transformer_engine import check_target, check_te
from s2train.validation.values import check_choice, check_values


def resolve(cfg: DictConfig, models: Sequence[str], overrides: Sequence[str] = ()) -> Any:
    """Convert a program's composed configuration to its dataclass.

    Sets a run's lowest learning rate as `optim.min_lr`, and the steps that follow from tokens, so that saved settings
    contain them.

    Args:
        models: the names that `+model=` accepts.
        overrides: the command line's.
    Raises:
        ConfigError: no model is set, a setting has no value, or steps and tokens contradict each other.
    """
    if OmegaConf.is_missing(cfg, "model") or ("model" in cfg and OmegaConf.is_missing(cfg.model, "name")):
        raise no_model(models)
    if OmegaConf.select(cfg, "train.tokens") is not None and OmegaConf.is_missing(cfg.train, "steps"):
        cfg.train.steps = 0  # until it is derived
    resolved = to_object(cfg)
    if isinstance(resolved, PretrainConfig):
        derive_steps(resolved, steps_given(overrides))
        resolved.optim.min_lr = resolved.optim.lowest_lr
    return resolved


def check(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> Plan:
    """Check that a run can start on these ranks; returns its plan.

    Raises:
        ConfigError: a setting is out of range, sizes don't divide, no head sees some blocks, or memory is too small.
    """
    check_settings(cfg, hardware)
    check_division(cfg, world_size)
    _check_profiled_ranks(cfg, world_size)
    hybrid = _hybrid(cfg, hardware)
    _check_machine(cfg, hybrid, world_size, hardware)
    plan = make_plan(cfg, hybrid, world_size, hardware)
    check_memory(plan)
    return plan


def check_memory(plan: Plan) -> None:
    """Check that a plan fits its device's memory.

    Raises:
        ConfigError: it doesn't; the error names what needs the memory, and settings that fit.
    """
    if plan.remedy is not None:
        raise ConfigError(*_shortage(plan), plan.remedy)


def _check_profiled_ranks(cfg: PretrainConfig, world_size: int) -> None:
    if cfg.profile.steps is None:
        return
    if beyond := [rank for rank in cfg.profile.ranks if rank >= world_size]:
        problem = f"there {'is 1 rank' if world_size == 1 else f'are {world_size} ranks'}, but no rank {beyond[0]}"
        kept = [rank for rank in cfg.profile.ranks if rank < world_size] or [0]
        raise ConfigError("profile.ranks", cfg.profile.ranks, problem, f"Set profile.ranks={kept}.")


def check_attention_backend(name: str, hardware: Hardware) -> None:
    """Check that the attention op's backend exists and can run on `hardware`.

    Raises:
        ConfigError: an unknown name, or Triton without CUDA.
    """
    check_choice("attention_backend", name)
    if name in ("triton", "portable") and hardware.kind == "cpu":
        raise ConfigError("attention_backend", name, "there is no CUDA device", "Set attention_backend=auto.")


def preview(cfg: PretrainConfig, world_size: int, hardware: Hardware) -> Plan:
    """Make the plan to print, whether it fits or not.

    The plan has more ranks if `world_size` can't hold the model once.

    Raises:
        ConfigError: as `check`, except for memory, the number of ranks, and what the machine lacks.
    """
    check_settings(cfg, hardware)
    copy = smallest_world(cfg)
    ranks = copy if world_size % copy else world_size
    if hardware.kind == "cpu":  # all ranks share this machine's RAM
        hardware = replace(hardware, memory=hardware.memory * world_size // ranks)
    check_division(cfg, ranks)
    return make_plan(cfg, _hybrid(cfg, hardware), ranks, hardware)


def asked_plan(cfg: PretrainConfig, world_size: int) -> Plan:
    """Make the plan that `cfg.plan` asks for, whether it fits or not.

    Args:
        world_size: of this job, which the plan is for unless plan.count is set.
    Raises:
        ConfigError: as `preview`, `planned_for` and `check_planned_machine`.
    """
    ranks, hardware = planned_for(cfg, world_size)
    plan = preview(cfg, ranks, hardware)
    check_planned_machine(cfg, hybrid_layout(cfg), plan.world_size, hardware)
    return plan


def check_planned_machine(cfg: PretrainConfig, hybrid: HybridLayout, world_size: int, hardware: Hardware) -> None:
    """Check a plan's device; for this machine, also its libraries.

    Raises:
        ConfigError: the device can't serve the run; or without plan.device, something is not installed.
    """
    if cfg.plan.device is not None:
        check_target(cfg, hardware)
        check_overlap(cfg, world_size, hardware)
        check_fa4_serves(cfg, hybrid, hardware)
        return
    try:
        _check_machine(cfg, hybrid, world_size, hardware)
    except ConfigError as error:
        remedy = f"{error.remedy.rstrip('.')}. plan.device=h100-80gb plans for another machine."
        raise ConfigError(error.setting, error.value, error.problem, remedy) from None


def _check_machine(cfg: PretrainConfig, hybrid: HybridLayout, world_size: int, hardware: Hardware) -> None:
    """Check that device and installed libraries have what the settings ask for."""
    check_attention_backend(cfg.attention_backend, hardware)
    check_te(cfg, hardware)
    check_overlap(cfg, world_size, hardware)
    check_libraries(cfg, hybrid, hardware)


def check_settings(cfg: PretrainConfig, hardware: Hardware) -> None:
    """Check settings that depend on neither layout nor division.

    Raises:
        ConfigError: one is out of range, or `hardware` can't serve it.
    """
    check_values(cfg)
    check_optimizer(cfg)
    check_options(cfg)
    check_offload(cfg, hardware)
    check_parts(cfg)


def _hybrid(cfg: PretrainConfig, hardware: Hardware) -> HybridLayout:
    hybrid = hybrid_layout(cfg)
    check_layout(cfg, hybrid, hardware)
    return hybrid


def check_layout(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    """Check a layout against the sequence, requested features and kernels.

    Raises:
        ConfigError: they don't support it.
    """
    check_blocks(cfg, hybrid)
    check_kinds(cfg, hybrid, hardware)
    check_kernel_settings(cfg, hybrid)


def check_blocks(cfg: PretrainConfig, hybrid: HybridLayout) -> None:
    """Check that sparse layers can split the sequence into blocks.

    Raises:
        ConfigError: the sequence is shorter than a block, or context parallel splits a block.
    """
    block, length, cp = cfg.layout.block_size, cfg.train.seq_length, cfg.parallel.cp
    if all(layer.is_dense for layer in hybrid.layers):
        return
    if length < block:
        raise ConfigError(
            "train.seq_length",
            length,
            f"the sequence is shorter than a block of {block} tokens",
            f"Set train.seq_length to {block} or more, or layout.block_size to {length} or less.",
        )
    if cp > 1 and length % (2 * cp * block):
        raise ConfigError(
            "train.seq_length",
            length,
            f"parallel.cp={cp} splits it into {2 * cp} chunks, which must be whole blocks of {block}",
            multiple_of("train.seq_length", length, 2 * cp * block),
        )


def _shortage(plan: Plan) -> tuple[str, object, str]:
    """Return setting, value and problem of the largest part of memory."""
    memory, train, device = plan.memory, plan.cfg.train, plan.hardware
    states = memory.weights + memory.gradients + memory.optimizer
    room = "its share of this machine's RAM is" if device.kind == "cpu" else f"{device.name} has"
    micro_batch = f"{train.micro_batch_size} × {train.seq_length:,} tokens"
    problem = (
        f"{plan.cfg.model.name} needs {memory.total / GIB:.1f} GiB on each process, "
        f"{states / GIB:.1f} of it for weights, gradients and optimizer, "
        f"{memory.activations / GIB:.1f} for activations of {micro_batch}, "
        f"{f'{memory.teacher / GIB:.1f} for the teacher, ' if memory.teacher else ''}"
        f"and {room} {device.memory / GIB:.1f}"
    )
    if states > memory.activations:
        return "+model", plan.cfg.model.name, problem
    return "train.micro_batch_size", train.micro_batch_size, problem
