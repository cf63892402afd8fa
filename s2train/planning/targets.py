"""Defines GPUs to plan for without having them: `plan.device=h100-80gb plan.count=8`."""

import difflib
from dataclasses import replace

from s2train.config import PretrainConfig
from s2train.environment.hardware import Hardware, detect_own, gpu_rates
from s2train.errors import ConfigError
from s2train.validation.division import smallest_world
from s2train.validation.values import check_values

_GIB = 1024**3
# Name -> torch's name, memory in GiB reported by torch (rounded down), compute capability.
_TARGETS: dict[str, tuple[str, float, tuple[int, int]]] = {
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 39.3, (8, 0)),
    "a100-80gb": ("NVIDIA A100-SXM4-80GB", 79.1, (8, 0)),
    "l40s-48gb": ("NVIDIA L40S", 44.3, (8, 9)),
    "h100-80gb": ("NVIDIA H100 80GB HBM3", 79.1, (9, 0)),
    "h200-141gb": ("NVIDIA H200", 139.7, (9, 0)),
    "b200-180gb": ("NVIDIA B200", 178.3, (10, 0)),
}
NAMES = tuple(_TARGETS)


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
    device, memory, capability = _TARGETS[found[0]]
    return Hardware(device, "cuda", int(memory * _GIB), gpu_rates(device), capability)


def planned_for(cfg: PretrainConfig, world_size: int) -> tuple[int, Hardware]:
    """Return the number of processes to plan for, and their device.

    Defaults to this job's.

    Args:
        world_size: of this job; the default if plan.count is not set.
    Raises:
        ConfigError: unknown device; a count that doesn't hold whole copies of the model; a setting out of range.
    """
    check_values(cfg)
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
    return count or world_size, hardware
