"""Chooses a run's starting checkpoint, and locks its run folder."""

import shutil
from contextlib import suppress
from itertools import chain, count
from pathlib import Path

from s2train.checkpoints.folders import find_checkpoint, read_config
from s2train.checkpoints.integrity import known_problem
from s2train.checkpoints.listing import checkpoints_of, is_own, own_checkpoints, step_of
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.files import FolderLock, lock_folder


def choose_checkpoint(cfg: PretrainConfig) -> Path | None:
    """Choose the checkpoint to start from, by `checkpoint.resume`.

    Returns:
        None for a new run.
    Raises:
        ConfigError: `checkpoint.resume` names no checkpoint, or the run would add its own among later ones.
    """
    resume, own = cfg.checkpoint.resume, checkpoints_of(cfg.run_dir)
    if resume == "auto":
        return own[-1] if own else None
    # The same command was started before.
    is_repeated = bool(own) and resume != "never" and _resumed_from(own) in (resume, None)
    if is_repeated and Path(resume).resolve() not in [path.resolve() for path in own]:
        return own[-1]
    found = None if resume == "never" else find_checkpoint(resume, "checkpoint.resume")
    if all(known_problem(path) for path in reversed(_later_checkpoints(cfg, found))):
        return found  # no intact checkpoint is lost
    if is_repeated:
        return own[-1]
    problem = f"{cfg.run_dir} holds checkpoints up to {own[-1].name}, and this run would add its own among them"
    raise ConfigError(
        "checkpoint.resume", resume, problem, "Set checkpoint.resume=auto to resume from the last, or another run_dir"
    )


def _resumed_from(own: list[Path]) -> str | None:
    """`checkpoint.resume` of the run that wrote these checkpoints.

    Reads the last readable checkpoint; None if none is readable.
    """
    for checkpoint in reversed(own):
        with suppress(ConfigError):
            return read_config(checkpoint).checkpoint.resume
    return None


def _later_checkpoints(cfg: PretrainConfig, start: Path | None) -> list[Path]:
    """Checkpoints of the run folder after `start`.

    A run from `start` would write its own among them.
    """
    own = checkpoints_of(cfg.run_dir)
    if start is None or not is_own(start, cfg.run_dir):
        return own
    return [path for path in own if step_of(path) > step_of(start)]


def claim_run_dir(cfg: PretrainConfig, start: Path | None) -> FolderLock:
    """Create the run folder, and lock it against other jobs.

    The lock lasts until this process ends. Call it on rank 0. Removes incomplete saves. Renames checkpoints newer than
    the start that are damaged or could not be loaded to `damaged_iter_*`, and prints a line for each.

    Args:
        start: checkpoint that the run starts from; None for a new run.
    Raises:
        ConfigError: the folder can't be written, or another job holds it.
    """
    lock = lock_folder("run_dir", Path(cfg.run_dir), ".lock", "another job is running there")
    for partial in own_checkpoints(cfg.run_dir).glob(".iter_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)  # its writers may still be running
    for newer in _later_checkpoints(cfg, start):
        if problem := known_problem(newer):
            kept = newer.rename(free_damaged_name(newer))
            print(f"{newer}: {problem}; kept as {kept.name}", flush=True)
    return lock


def free_damaged_name(checkpoint: Path) -> Path:
    """First free name of `damaged_iter_0000010`, `damaged_iter_0000010.1`, …."""
    name = f"damaged_{checkpoint.name}"
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    return next(path for path in map(checkpoint.with_name, names) if not path.exists())
