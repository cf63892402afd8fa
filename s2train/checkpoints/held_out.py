"""Compares a run's held-out data with those of its checkpoint.

They may differ, since they change nothing that is trained. Losses before and after are then of different texts.
"""

from dataclasses import dataclass
from typing import Any

from s2train.checkpoints.saved_run import SavedRun
from s2train.config import PretrainConfig
from s2train.data.contents import are_same, contents_at
from s2train.errors import as_typed


@dataclass(frozen=True)
class HeldOutChange:
    """Held-out data that differ from the checkpoint's.

    Attributes:
        step: steps before the change.
        before, now: value of `data.valid_path`, and its datasets' contents.
    """

    step: int
    before: tuple[Any, list[str]]
    now: tuple[Any, list[str]]

    def __str__(self) -> str:
        (before, _), (now, _) = self.before, self.now
        later = "other contents of these files" if before == now else _named(now)
        return (
            f"warning: held-out losses before and after step {self.step} are of different texts:"
            f" {_named(before)} before, {later} after"
        )


def _named(valid_path: Any) -> str:
    return "documents held out by data.split" if valid_path is None else as_typed(valid_path)


def held_out_contents(cfg: PretrainConfig) -> list[str] | None:
    """Fingerprint the datasets of `data.valid_path`.

    Empty if it is not set: `data.path`, which then holds the held-out documents, is compared by `data_order`. None if a
    file is missing.
    """
    return [] if cfg.data.valid_path is None else contents_at(cfg.data.valid_path)


def has_same_contents(saved: list[str] | None, now: list[str] | None) -> bool | None:
    """Compare held-out data; None if either is unknown."""
    return None if saved is None or now is None else are_same(saved, now, at_same_paths=True)


def held_out_change(cfg: PretrainConfig, saved: SavedRun, now: list[str] | None) -> HeldOutChange | None:
    """Return how held-out data differ from a checkpoint's.

    None if they don't, or if either is unknown: earlier checkpoints don't record theirs.

    Args:
        now: `held_out_contents` of the run.
    """
    before, progress = saved.progress.held_out, saved.progress
    if before is None or now is None or has_same_contents(before, now):
        return None
    return HeldOutChange(progress.step, (saved.config.data.valid_path, before), (cfg.data.valid_path, now))
