"""Reads what a checkpoint says of the run that wrote it."""

from dataclasses import dataclass
from pathlib import Path

from s2train.checkpoints.folders import Progress, read_config, read_progress, remedy_for_damage
from s2train.checkpoints.integrity import damage
from s2train.checkpoints.listing import is_own
from s2train.config import PretrainConfig
from s2train.errors import ConfigError

_RESUME = "checkpoint.resume"


@dataclass(frozen=True)
class SavedRun:
    """The run that wrote the checkpoint from which another one starts.

    Attributes:
        is_own: whether the other run has the same run folder, so that it resumes this one.
    """

    checkpoint: Path
    config: PretrainConfig
    progress: Progress
    is_own: bool

    @classmethod
    def read(cls, checkpoint: Path, run_dir: str) -> "SavedRun":
        """Read settings and progress.

        Args:
            run_dir: of the run that starts.
        Raises:
            ConfigError: the checkpoint is damaged, or another version of s2train wrote it.
        """
        if problem := damage(checkpoint):
            raise ConfigError(_RESUME, checkpoint, problem, remedy_for_damage(checkpoint, _RESUME))
        progress, config = read_progress(checkpoint, _RESUME), read_config(checkpoint, _RESUME)
        return cls(checkpoint, config, progress, is_own(checkpoint, run_dir))
