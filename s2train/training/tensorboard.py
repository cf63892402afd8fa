"""Writes metrics for TensorBoard."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2train.config import PretrainConfig
from s2train.errors import ConfigError


class TensorBoard:
    """Writes a run's event files with torch, as Megatron's training program does.

    Args:
        folder: created if needed; a resumed run adds a file.
        step: step from which the run starts. TensorBoard hides what an earlier, killed run wrote after it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        torchs = import_module("torch.utils.tensorboard")  # slow, and not installed everywhere
        self._writer: Any = torchs.SummaryWriter(str(folder), purge_step=step + 1, flush_secs=30)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of a report by their names in wandb."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Write a text, such as settings that changed."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def check_tensorboard(cfg: PretrainConfig) -> None:
    """Check that `tracking.tensorboard` can be served.

    Raises:
        ConfigError: the package is not installed.
    """
    if cfg.tracking.tensorboard and find_spec("tensorboard") is None:
        install = (
            "Install the extra `tensorboard` (pip install 's2train[tensorboard]'), or set tracking.tensorboard=false."
        )
        raise ConfigError("tracking.tensorboard", True, "tensorboard is not installed", install)
