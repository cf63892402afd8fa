"""Folders that a program is going to write to."""

import os
from pathlib import Path

from s2train.errors import ConfigError


def check_writable(setting: str, folder: str | Path) -> None:
    """Whether `folder` can be written, or be made. Makes nothing.

    Raises ConfigError, on `setting`, if not.
    """
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if str(folder) == "" or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "names no folder" if str(folder) == "" else f"{there} is {'' if there.is_dir() else 'no folder'}"
        raise ConfigError(setting, folder, problem, "Name another folder")
