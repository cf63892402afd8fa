"""Builds commands, batch scripts and environments of a sweep's jobs."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2train.config import SlurmSweepConfig
from s2train.sweeps.jobs import RANK_LOGS

# Variables that torchrun sets in its ranks, and torchrun's own settings: a job inherits neither from the sweep.
_TORCHRUN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_PREFIXES = ("MASTER_", "ROLE_", "TORCHELASTIC_", "PET_")


def is_torchrun_variable(variable: str) -> bool:
    """Whether an environment variable belongs to torchrun."""
    return variable in _TORCHRUN_VARIABLES or variable.startswith(_PREFIXES)


def environment(surrounding: Mapping[str, str], gpus: Sequence[str] | None) -> dict[str, str]:
    """Build a job's environment from the sweep's, without torchrun's variables.

    Args:
        gpus: GPUs that the job may use; None: all.
    """
    clean = {name: value for name, value in surrounding.items() if not is_torchrun_variable(name)}
    clean.pop("HYDRA_FULL_ERROR", None)  # `run_hydra` set it for the sweep's process only
    return clean if gpus is None else clean | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def on_one_node(launcher: list[str], nproc_per_node: int, program: Path, arguments: Sequence[str]) -> list[str]:
    """Build the command of a job on one machine.

    torchrun chooses a free port.

    Args:
        launcher: starts the ranks, and takes torchrun's options.
    """
    return [*launcher, "--standalone", "--nproc-per-node", str(nproc_per_node), str(program), *arguments]


def batch_script(
    settings: SlurmSweepConfig, name: str, folder: Path, cwd: Path, python: str, program: Path, arguments: Sequence[str]
) -> str:
    """Build a job's sbatch script, which logs to its folder.

    At the time limit the ranks save, and the job is requeued. On one node, the batch step itself starts the ranks
    (`slurm/requeue.sh` in the program's folder); on several, `slurm/run.sh` does, as in `slurm/pretrain.sbatch`.
    """
    options: dict[str, object] = {
        "job-name": name,
        "output": str(folder / "log.txt").replace("%", "%%"),  # sbatch expands a single %
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.nproc_per_node,
        "signal": "B:USR1@300",  # for requeue.sh, which requeues the job
        "requeue": True,  # the cluster's default may be false
        **{name.replace("_", "-"): value for name, value in settings.options.items()},
    }
    launch = program.parent
    if settings.nodes == 1:
        launcher = [str(launch / "slurm" / "requeue.sh"), python, str(launch / "job.py")]
        start = f"exec {shlex.join(on_one_node(launcher, settings.nproc_per_node, program, arguments))}"
    else:
        run = shlex.join([str(launch / "slurm" / "run.sh"), str(program), *arguments])
        where = f"PYTHON={shlex.quote(python)} LOG_DIR={shlex.quote(str(folder / RANK_LOGS))}"
        start = f"{where} NPROC_PER_NODE={settings.nproc_per_node} exec {run}"
    unset = f"unset {' '.join(sorted(_TORCHRUN_VARIABLES))} {' '.join(f'${{!{prefix}@}}' for prefix in _PREFIXES)}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{option}" for option in map(_option, options, options.values()) if option),
        "set -eo pipefail",
        unset,
        f"cd {shlex.quote(str(cwd))}",
        *settings.setup,
        start,
    ]
    return "\n".join(lines) + "\n"


def _option(name: str, value: object) -> str | None:
    """Format an sbatch option without its dashes.

    True makes it a flag; None and False omit it.
    """
    if value is None or value is False:
        return None
    return name if value is True else f"{name}={shlex.quote(str(value))}"
