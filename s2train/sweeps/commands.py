"""What a job of a sweep runs, as a process here or as a batch script."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from s2train.config import SlurmSweepConfig

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


def quoted(value: object) -> str:
    """A value that Hydra reads as this very text."""
    # A backslash is one everywhere but before a quote, where it wants another.
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"'{text}'"


def torchrun(python: str, nproc_per_node: int, program: Path, arguments: Sequence[str]) -> list[str]:
    """The command of one job on this machine, with a free port of its own."""
    start = [python, "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", str(nproc_per_node), str(program), *arguments]


def batch_script(
    settings: SlurmSweepConfig, name: str, folder: Path, cwd: Path, python: str, program: Path, arguments: Sequence[str]
) -> str:
    """The sbatch script of one job, with its log in the job's folder.

    It starts by `slurm/run.sh` beside the program, as `slurm/pretrain.sbatch` does: a torchrun on each node, which
    saves when the time is up, and the job queued again.
    """
    options: dict[str, object] = {
        "job-name": name,
        "output": str(folder / "log.txt").replace("%", "%%"),  # sbatch fills in what follows a single %
        "open-mode": "append",
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.nproc_per_node,
        "signal": "B:USR1@300",  # for run.sh, which queues the job again
        **{name.replace("_", "-"): value for name, value in settings.options.items()},
    }
    run = shlex.join([str(program.parent / "slurm" / "run.sh"), str(program), *arguments])
    where = f"PYTHON={shlex.quote(python)} LOG_DIR={shlex.quote(str(folder / 'logs'))}"
    unset = f"unset {' '.join(sorted(_OF_RANKS))} {' '.join(f'${{!{prefix}@}}' for prefix in _PREFIXES)}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None),
        "set -eo pipefail",
        unset,
        f"cd {shlex.quote(str(cwd))}",
        *settings.setup,
        f"{where} NPROC_PER_NODE={settings.nproc_per_node} exec {run}",
    ]
    return "\n".join(lines) + "\n"
