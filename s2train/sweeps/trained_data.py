"""Compares a trained run's data with those that are there."""

import os
from collections.abc import Mapping
from typing import Any

from s2train.checkpoints.data_order import has_contents
from s2train.checkpoints.folders import Progress
from s2train.checkpoints.held_out import has_same_contents, held_out_contents
from s2train.config import PretrainConfig
from s2train.data.tokenizers import fingerprint


def moved_data(progress: Progress, before: Mapping[str, Any], cfg: PretrainConfig) -> set[str]:
    """Return the settings of data that were moved with a run's folder.

    Each of their paths has kept its place relative to the folder. Datasets and tokenizer are also those that the last
    checkpoint records; held-out data may be any if it records none.

    Args:
        progress: of the run's last checkpoint.
        before: its saved settings by name.
        cfg: settings that name the data now.
    """
    data = cfg.data
    same = {
        "data.path": (data.path, has_contents(progress.order, cfg, at_same_paths=False)),
        "data.valid_path": (data.valid_path, progress.held_out is None or _has_held_out(progress, cfg)),
        "data.tokenizer": (data.tokenizer, progress.tokenizer == fingerprint(data.tokenizer)),
    }
    return {
        name
        for name, (now, is_same) in same.items()
        if is_same and _are_in_place(before.get(name), before["run_dir"], now, cfg.run_dir)
    }


def replaced_data(progress: Progress, cfg: PretrainConfig) -> str | None:
    """Return the setting whose files were replaced since a run's last checkpoint.

    None if none were, or if they are not there.

    Args:
        progress: of that checkpoint.
        cfg: settings that name the data, where they were in training.
    """
    if has_contents(progress.order, cfg, at_same_paths=True) is False:
        return "data.path"
    if _has_held_out(progress, cfg) is False:
        return "data.valid_path"
    tokenizer = fingerprint(cfg.data.tokenizer)
    return None if None in (tokenizer, progress.tokenizer) or tokenizer == progress.tokenizer else "data.tokenizer"


def _has_held_out(progress: Progress, cfg: PretrainConfig) -> bool | None:
    """Whether held-out data have a checkpoint's contents; None if unknown."""
    return has_same_contents(progress.held_out, held_out_contents(cfg))


def _are_in_place(before: Any, run_before: str, now: Any, run_now: str) -> bool:
    """Whether paths kept their places relative to the run folder."""
    entries = [[str(one) for one in (value if isinstance(value, list | tuple) else [value])] for value in (before, now)]
    return len(entries[0]) == len(entries[1]) and all(
        old == new or os.path.relpath(old, run_before) == os.path.relpath(new, run_now)
        for old, new in zip(*entries, strict=True)
    )
