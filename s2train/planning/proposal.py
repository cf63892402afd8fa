"""Proposes how to divide a model over GPUs.

If no division is possible, it says why.
"""

from collections import Counter
from dataclasses import replace

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.memory import GIB
from s2train.costs.step_time import GPUS_PER_MACHINE
from s2train.environment.hardware import Hardware, detect_own
from s2train.errors import ConfigError
from s2train.planning.checks import check_planned_machine, check_settings
from s2train.planning.division import Search, can_divide, search
from s2train.planning.run_layout import hybrid_layout
from s2train.planning.targets import ONE_OF_NAMES, target_gpu
from s2train.validation.overlap import check_overlap

_MOST_GPUS = 4096  # to look for a number that suffices
_LARGEST = 16_384  # GPUs whose divisions are searched


def propose(cfg: PretrainConfig) -> Search:
    """Search the divisions over `plan.gpus` GPUs of `plan.device`, by default this machine's.

    Raises:
        ConfigError: a setting is out of range, the device is unknown or can't serve a setting, its steps can't be
            predicted, or no division is possible or fits.
    """
    hardware = detect_own() if cfg.plan.device is None else target_gpu(cfg.plan.device)
    if hardware.kind != "cuda":
        raise ConfigError("plan.device", "(not set)", "this machine has no GPU", f"Set plan.device to {ONE_OF_NAMES}.")
    hardware = replace(hardware, per_machine=GPUS_PER_MACHINE)
    check_settings(cfg, hardware)
    gpus, cfg = _number(cfg), _undivided(cfg)
    hybrid = hybrid_layout(cfg)
    check_planned_machine(cfg, hybrid, gpus, hardware)
    divided = replace(cfg.parallel, tp=min(gpus, 2), sequence_parallel=True)
    check_overlap(replace(cfg, parallel=divided), 2, hardware)  # else each division with tp above 1 would be rejected
    _check_predictable(cfg, hybrid, hardware)
    found = search(cfg, hybrid, gpus, hardware)
    if not found.fitting and not found.too_large:
        raise _impossible(found, hybrid)
    if not found.fitting:
        raise _too_large(found, hybrid)
    return found


def _number(cfg: PretrainConfig) -> int:
    gpus = cfg.plan.gpus
    assert gpus is not None
    if cfg.plan.count is not None:
        problem = f"plan.count={cfg.plan.count} plans the division that is set, and this proposes others"
        raise ConfigError("plan.gpus", gpus, problem, "Set one of them.")
    if gpus > _LARGEST:
        raise ConfigError("plan.gpus", gpus, f"divisions over up to {_LARGEST} GPUs are planned", "Set fewer.")
    if gpus > GPUS_PER_MACHINE and gpus % GPUS_PER_MACHINE:
        below = gpus // GPUS_PER_MACHINE * GPUS_PER_MACHINE
        problem = f"machines of {GPUS_PER_MACHINE} GPUs are assumed, and it is no multiple of {GPUS_PER_MACHINE}"
        raise ConfigError("plan.gpus", gpus, problem, f"Set plan.gpus={below} or {below + GPUS_PER_MACHINE}.")
    return gpus


def _undivided(cfg: PretrainConfig) -> PretrainConfig:
    """Leave out the division that the model's file sets.

    It would limit the search.
    """
    parallel = replace(cfg.parallel, tp=1, pp=1, cp=1, vpp=None, sequence_parallel=False)
    return replace(cfg, parallel=parallel)


def _check_predictable(cfg: PretrainConfig, hybrid: HybridLayout, hardware: Hardware) -> None:
    remedy = "Plan one division: leave plan.gpus out, and set plan.count"
    if hardware.rates is None:
        problem = f"the peak rate of {hardware.name} is unknown"
        raise ConfigError("plan.device", cfg.plan.device or "(not set)", problem, f"Set it to {ONE_OF_NAMES}.")
    if cfg.train.precision != "bf16":
        problem = "steps were measured, and can be predicted, in bf16 only"
        raise ConfigError("train.precision", cfg.train.precision, problem, f"{remedy}, or train.precision=bf16.")
    if not hybrid.is_static:
        problem = "no step was measured of layers that read what the data choose, so none can be predicted"
        raise ConfigError("layout.layers", cfg.layout.layers, problem, f"{remedy}, or letters with fixed patterns.")


def _impossible(found: Search, hybrid: HybridLayout) -> ConfigError:
    """Explain the most frequent rejection, and name the nearest usable GPU count."""
    (often, _), *_ = Counter(error.setting for error in found.rejected).most_common(1)
    reason = next(error for error in found.rejected if error.setting == often)
    problem = f"no division is possible; one of {len(found.rejected)} rejections: {reason.given}: "
    sizes = sorted(range(1, 2 * found.gpus + GPUS_PER_MACHINE), key=lambda size: abs(size - found.gpus))
    whole = (size for size in sizes if size <= GPUS_PER_MACHINE or size % GPUS_PER_MACHINE == 0)
    near = next((size for size in whole if can_divide(found.cfg, hybrid, size, found.hardware)), None)
    remedy = reason.remedy if near is None else f"Set plan.gpus={near}, or change {reason.setting}."
    return ConfigError("plan.gpus", found.gpus, problem + reason.problem, remedy)


def _too_large(found: Search, hybrid: HybridLayout) -> ConfigError:
    """Name the smallest division, and a number of GPUs that suffices.

    The smallest division is the one that needs the least memory.
    """
    least = min(found.too_large, key=lambda candidate: candidate.memory.total)
    over = (least.memory.total - found.room) / GIB
    problem = (
        f"no division fits into {found.room / GIB:.1f} GiB of {found.hardware.name}; "
        f"the smallest needs {over:.1f} more "
        f"({' '.join(least.settings)})"
    )
    gpus = 2 * found.gpus
    while gpus <= _MOST_GPUS:
        if search(found.cfg, hybrid, gpus, found.hardware).fitting:
            return ConfigError("plan.gpus", found.gpus, problem, f"Set plan.gpus={gpus}, or a larger plan.device.")
        gpus *= 2
    return ConfigError("plan.gpus", found.gpus, problem, "Use a smaller model or train.seq_length.")
