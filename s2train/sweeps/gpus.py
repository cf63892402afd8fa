"""Divides a machine's GPUs among concurrent jobs."""

import os

import torch

from s2train.config import LocalSweepConfig
from s2train.errors import ConfigError


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, as named in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


def divide_gpus(settings: LocalSweepConfig, gpus: list[str]) -> list[list[str] | None]:
    """Assign GPUs to each concurrent job.

    None stands for all GPUs: there are none, or `split_gpus` is off.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    per_job = settings.nproc_per_node
    if not gpus or not settings.split_gpus:
        return [None] * settings.n_jobs
    if (wanted := settings.n_jobs * per_job) > len(gpus):
        raise ConfigError(
            "hydra.launcher.n_jobs",
            settings.n_jobs,
            f"with hydra.launcher.nproc_per_node={per_job} needs {wanted} GPUs, but {len(gpus)} are visible",
            f"Set it to {len(gpus) // per_job}" if len(gpus) >= per_job else "Set nproc_per_node lower",
        )
    return [gpus[start : start + per_job] for start in range(0, wanted, per_job)]
