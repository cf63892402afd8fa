"""What a job of a sweep runs, as a process here or as a batch script."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2train.config import SlurmSweepConfig
from s2train.sweeps.jobs import RANK_LOGS

# What torchrun gives its ranks, and its own settings: a job is told neither of the sweep's surroundings.
_OF_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"}
_PREFIXES = ("MASTER_", "ROLE_", "TORCHELASTIC_", "PET_")


def is_of_ranks(variable: str) -> bool:
    """Whether an environment variable is torchrun's."""
    return variable in _OF_RANKS or variable.startswith(_PREFIXES)


def environment(surrounding: Mapping[str, str], gpus: Sequence[str] | None) -> dict[str, str]:
    """A job's environment: the surrounding one without torchrun's variables, and with these GPUs only (None: all)."""
    clean = {name: value for name, value in surrounding.items() if not is_of_ranks(name)}
    clean.pop("HYDRA_FULL_ERROR", None)  # `run_hydra` set it for the sweep's own process
    return clean if gpus is None else clean | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def torchrun(python: str, nproc_per_node: int, program: Path, arguments: Sequence[str]) -> list[str]:
    """The command of one job on this machine, with a free port of its own."""
    return _on_one_node([python, "-m", "torch.distributed.run"], nproc_per_node, program, arguments)


def _on_one_node(start: list[str], nproc_per_node: int, program: Path, arguments: Sequence[str]) -> list[str]:
    return [*start, "--standalone", "--nproc-per-node", str(nproc_per_node), str(program), *arguments]


def batch_script(
    settings: SlurmSweepConfig, name: str, folder: Path, cwd: Path, python: str, program: Path, arguments: Sequence[str]
) -> str:
    """The sbatch script of one job, with its log in the job's folder.

    When its time is up the ranks save, and the job is queued again. One node's ranks are started in the batch step
    itself (`slurm/requeue.sh` beside the program), several nodes' by `slurm/run.sh`, as in `slurm/pretrain.sbatch`.
    """
    options: dict[str, object] = {
        "job-name": name,
        "output": str(folder / "log.txt").replace("%", "%%"),  # sbatch fills in what follows a single %
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.nproc_per_node,
        "signal": "B:USR1@300",  # for requeue.sh, which queues the job again
        "requeue": True,  # where the cluster's default is not to
        **{name.replace("_", "-"): value for name, value in settings.options.items()},
    }
    launch = program.parent
    if settings.nodes == 1:
        launcher = [str(launch / "slurm" / "requeue.sh"), python, str(launch / "job.py")]
        start = f"exec {shlex.join(_on_one_node(launcher, settings.nproc_per_node, program, arguments))}"
    else:
        run = shlex.join([str(launch / "slurm" / "run.sh"), str(program), *arguments])
        where = f"PYTHON={shlex.quote(python)} LOG_DIR={shlex.quote(str(folder / RANK_LOGS))}"
        start = f"{where} NPROC_PER_NODE={settings.nproc_per_node} exec {run}"
    unset = f"unset {' '.join(sorted(_OF_RANKS))} {' '.join(f'${{!{prefix}@}}' for prefix in _PREFIXES)}"
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
    """One of sbatch's, without its dashes; True is the bare name, None and False leave it out."""
    if value is None or value is False:
        return None
    return name if value is True else f"{name}={shlex.quote(str(value))}"
