"""Where a run starts from, and whether it may."""

import os
from pathlib import Path

from s2train.config import PretrainConfig
from s2train.data.checks import num_train_samples
from s2train.errors import ConfigError
from s2train.training.checkpoint import check_same_architecture, find_checkpoint, read_config


def find_start(cfg: PretrainConfig) -> Path | None:
    """The checkpoint to start from, or None for a fresh run.

    Raises:
        ConfigError: `checkpoint.resume` names nothing, or the run folder holds checkpoints that the run would mix
            its own with.
    """
    resume, own = cfg.checkpoint.resume, Path(cfg.run_dir) / "checkpoints"
    used = own.is_dir() and any(own.glob("iter_*"))
    if resume == "auto":
        return find_checkpoint(own, "run_dir") if used else None
    if resume != "never":
        found = find_checkpoint(resume, "checkpoint.resume")
        if not used or found.parent.resolve() == own.resolve():
            return found
    if used:
        raise ConfigError(
            "checkpoint.resume",
            resume,
            f"{own} already holds checkpoints",
            "Set checkpoint.resume=auto to go on with them, or another run_dir",
        )
    return None


def check_resume(cfg: PretrainConfig) -> None:
    """Refuse to go on from a checkpoint of another model, or in another order of the data.

    Raises:
        ConfigError: as `find_start`; another architecture; a run folder that can't be written; another number of
            samples, which Megatron would shuffle anew.
    """
    _check_writable(Path(cfg.run_dir))
    found = find_start(cfg)
    if found is None:
        return
    check_same_architecture(cfg, found, "checkpoint.resume, or another run_dir")
    before, now = num_train_samples(read_config(found)), num_train_samples(cfg)
    if before != now and cfg.data.num_samples is None:
        raise ConfigError(
            "data.num_samples",
            now,
            f"{found} drew its batches from an order of {before:,} samples; another number is another order, in which"
            " samples would come twice or not at all",
            f"Set data.num_samples={before} to keep the order" + (f", or data.num_samples={now} to accept it"),
        )


def _check_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("run_dir", run_dir, f"can't be made ({error})", "Name another folder") from error
    if not os.access(run_dir, os.W_OK):
        raise ConfigError("run_dir", run_dir, "is not writable", "Name another folder")
