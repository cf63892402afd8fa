"""Which of a machine's GPUs each job sees."""

import os

import torch

from s2train.config import LocalSweepConfig
from s2train.errors import ConfigError


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; none on a CPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]


def shares(settings: LocalSweepConfig, gpus: list[str]) -> list[list[str] | None]:
    """For each of the jobs at work together, its GPUs; None: all, for there are none or they are not to be split.

    Raises:
        ConfigError: fewer GPUs than the jobs' processes.
    """
    per_job = settings.nproc_per_node
    if not gpus or not settings.split_gpus:
        return [None] * settings.n_jobs
    if (wanted := settings.n_jobs * per_job) > len(gpus):
        raise ConfigError(
            "hydra.launcher.n_jobs",
            settings.n_jobs,
            f"with hydra.launcher.nproc_per_node={per_job} takes {wanted} GPUs, and this machine shows {len(gpus)}",
            f"Set it to {len(gpus) // per_job}" if len(gpus) >= per_job else "Set nproc_per_node lower",
        )
    return [gpus[start : start + per_job] for start in range(0, wanted, per_job)]
