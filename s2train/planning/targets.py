"""Defines GPUs to plan for without having them: `plan.device=h100-80gb plan.count=8`."""

import difflib
from dataclasses import replace
from typing import NamedTuple

from s2train.config import PretrainConfig
from s2train.costs.memory import GIB
from s2train.costs.step_time import GPUS_PER_MACHINE
from s2train.environment.hardware import Hardware, detect_own, gpu_rates
from s2train.errors import ConfigError
from s2train.validation.division import smallest_world
from s2train.validation.values import check_values


class Target(NamedTuple):
    """A GPU to plan for. Its peak rates: `s2train.environment.hardware`.

    Attributes:
        name: torch's.
        memory: GiB reported by torch, rounded down.
        capability: compute capability.
        measured: files with its measured steps, which the prediction is tested against; empty: its rates are assumed
            to be those of an H100, scaled by peak rates.
    """

    name: str
    memory: float
    capability: tuple[int, int]
    measured: str = ""


_TARGETS = {
    "a100-40gb": Target("NVIDIA A100-SXM4-40GB", 39.3, (8, 0)),
    "a100-80gb": Target("NVIDIA A100-SXM4-80GB", 79.1, (8, 0)),
    "l40s-48gb": Target("NVIDIA L40S", 44.3, (8, 9)),
    "h100-80gb": Target("NVIDIA H100 80GB HBM3", 79.1, (9, 0), "launch/results/*-h100-*.json and *-h100x2-*.json"),
    "h200-141gb": Target("NVIDIA H200", 139.7, (9, 0), "launch/results/2026-11-28-h200-quality-speed.json"),
    "b200-180gb": Target("NVIDIA B200", 178.3, (10, 0)),
}
NAMES = tuple(_TARGETS)
ONE_OF_NAMES = f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"  # for remedies


def target_gpu(name: str) -> Hardware:
    """Return the GPU of a name; `h200` suffices if unambiguous.

    Raises:
        ConfigError: no GPU or several GPUs match.
    """
    wanted = name.lower().replace("_", "-")
    found = [known for known in NAMES if wanted in (known, known.partition("-")[0])]
    if len(found) != 1:
        near = found or difflib.get_close_matches(wanted, NAMES, n=1, cutoff=0.0)
        problem = "several GPUs match" if found else "unknown GPU"
        remedy = f"Did you mean {' or '.join(f'plan.device={known}' for known in near)}? There are {', '.join(NAMES)}"
        raise ConfigError("plan.device", name, problem, remedy)
    target = _TARGETS[found[0]]
    rates, memory = gpu_rates(target.name), int(target.memory * GIB)
    return Hardware(target.name, "cuda", memory, rates, target.capability, GPUS_PER_MACHINE)


def rates_basis(hardware: Hardware) -> str:
    """Format whether a GPU's rates were measured or are assumed."""
    measured = next((target.measured for target in _TARGETS.values() if target.name == hardware.name), "")
    return f"measured ({measured})" if measured else "assumed, as on an H100 in proportion to the peak rates"


def planned_for(cfg: PretrainConfig, world_size: int) -> tuple[int, Hardware]:
    """Return the number of processes to plan for, and their device.

    Defaults to this job's.

    Args:
        world_size: of this job; the default if plan.count is not set.
    Raises:
        ConfigError: unknown device; a count that doesn't hold whole copies of the model; a setting out of range.
    """
    check_values(cfg)
    if cfg.plan.gpus is not None:  # in a sweep; `launch/pretrain.py` proposes instead
        remedy = "Leave plan.gpus out, or set plan.count instead."
        raise ConfigError("plan.gpus", cfg.plan.gpus, "a sweep plans the division that is set", remedy)
    count, copy = cfg.plan.count, smallest_world(cfg)
    if count is not None and count % copy:
        parallel = cfg.parallel
        sizes = f"{parallel.tp} × {parallel.pp} × {parallel.cp} = {copy}"
        problem = f"one copy of the model takes parallel.tp × pp × cp = {sizes} GPUs"
        remedy = f"Set plan.count={-(-count // copy) * copy}, or a parallel.tp, pp and cp that divide {count}"
        raise ConfigError("plan.count", count, problem, remedy)
    if cfg.plan.device is not None:
        return count or world_size, target_gpu(cfg.plan.device)
    hardware = detect_own()
    if hardware.kind == "cpu" and count is not None:  # all processes share this machine's RAM
        hardware = replace(hardware, memory=hardware.memory * world_size // count)
    if hardware.kind == "cuda" and (count is not None or world_size % copy):  # other processes than those of this job
        hardware = replace(hardware, per_machine=GPUS_PER_MACHINE)
    return count or world_size, hardware
