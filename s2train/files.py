"""Files that are whole or not there, and folders that can hold them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2train.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to `path` if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def set_aside(path: Path) -> Path | None:
    """Rename a file to the first free name of `metrics.1.jsonl`, `metrics.2.jsonl`, …; None if there is none."""
    if not path.exists():
        return None
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(target)


def output_stem(output: Path, setting: str = "output") -> Path:
    """OUTPUT without a `.json` or `.png`, which programs add themselves.

    Raises:
        ConfigError: it names no file.
    """
    name = output.name.removesuffix(".json").removesuffix(".png")
    if not name:
        raise ConfigError(setting, output, "names no file", "Name one, such as runs/dense-and-hybrid")
    return output.with_name(name)


def check_writable(setting: str, folder: str | Path) -> None:
    """Whether `folder` can be written, or be made. Makes nothing.

    Raises ConfigError, on `setting`, if not.
    """
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if str(folder) == "" or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        problem = "names no folder" if str(folder) == "" else f"{there} is {'' if there.is_dir() else 'no folder'}"
        raise ConfigError(setting, folder, problem, "Name another folder")


class FolderLock:
    """Holds a lock file until `release` or the end of this process.

    A POSIX record lock, since children don't inherit it: a forked writer that outlives a killed run for a moment must
    not keep the run from being started again.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the file can't be written.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise
        except PermissionError as error:  # what some systems say for the same
            self._file.close()
            raise BlockingIOError(str(error)) from error

    def release(self) -> None:
        self._file.close()
