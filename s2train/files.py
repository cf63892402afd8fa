"""Writes files atomically, checks output folders and locks them."""

import fcntl
import json
import math
import os
import tokenize
import zipfile
import zlib
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from s2train.errors import ConfigError, first_line

# What reading an .npz raises if it is empty, damaged or no .npz. NumPy parses headers as Python.
UNREADABLE_ARRAYS = (
    OSError, ValueError, KeyError, AttributeError, TypeError, EOFError, RuntimeError, SyntaxError, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` on success.

    It is in the folder of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def without_nan(content: Any) -> Any:
    """Return `content` with None for each number that is not finite.

    JSON has no NaN and no infinity, and any JSON parser must be able to read a diverged run's files.
    """
    if isinstance(content, dict):
        return {name: without_nan(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def reading(
    setting: str,
    path: Path,
    problem: str = "holds no results of this program",
    remedy: str = "Name another file, or move this one away",
) -> Iterator[None]:
    """Name a file that can't be read, with the cause.

    Raises:
        ConfigError: the statements inside found something else in it.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(setting, path, f"{problem} ({first_line(error)})", remedy) from error


def sync(path: Path) -> None:
    """Write a file, or a folder's names, to disk.

    A power loss can't undo it then. File systems that can't sync folders are left to themselves.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def set_aside(path: Path) -> Path | None:
    """Rename a file to the first free of `metrics.1.jsonl`, `metrics.2.jsonl`, …

    Returns the new path; None if the file doesn't exist.
    """
    if not path.exists():
        return None
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return path.rename(target)


def output_stem(output: Path, setting: str = "output") -> Path:
    """Strip `.json` or `.png` from OUTPUT; programs add these themselves.

    Raises:
        ConfigError: it names no file, or its folder can't be written.
    """
    name = _bare_name(output)
    if not name:
        raise ConfigError(setting, output, "names no file", "Name one, such as runs/dense-and-hybrid")
    check_writable(setting, output.parent, output)
    return output.with_name(name)


def _bare_name(output: Path) -> str:
    return output.name.removesuffix(".json").removesuffix(".png")


def new_file(text: str) -> Path:
    """Parse an option's file to write.

    Raises:
        ArgumentTypeError: it exists, or its folder can't be written.
    """
    path = Path(text)
    if os.path.exists(path):  # False if it can't be looked up, where Path.exists raises
        raise ArgumentTypeError(f"{path} exists: results are not overwritten, name another file")
    try:
        check_writable("--output", path.parent)
    except ConfigError as error:
        raise ArgumentTypeError(f"{error.problem}. {error.remedy}") from error
    return path


def describe_output(output: Path) -> str:
    """Name the two files that OUTPUT stands for."""
    stem = output.with_name(_bare_name(output))
    return f"results in {stem}.json, picture in {stem}.png"


def check_writable(setting: str, folder: str | Path, given: str | Path | None = None) -> None:
    """Check that `folder` can be written or created, without creating it.

    Args:
        given: the setting's value, if it is not the folder.
    Raises:
        ConfigError: on `setting`, if it can't.
    """
    value = folder if given is None else given
    if str(folder) == "":
        raise ConfigError(setting, value, "names no folder", "Name another folder")
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
    if not there.is_dir():
        raise ConfigError(setting, value, f"{there} is no folder", "Name another folder")
    try:
        with TemporaryFile(dir=there):  # root has all rights, also where nothing can be created: /proc
            pass
    except OSError as error:
        problem = f"{there} can't be written ({error.strerror})"
        raise ConfigError(setting, value, problem, "Name another folder") from error


def check_output(output: str | Path, overwrite: bool | None, such: str) -> Path:
    """Check that a program can write the file of its setting `output`.

    Args:
        overwrite: the program's setting; None: it has no such setting, and replaces no file.
        such: example of a file, for the error's remedy.

    Raises:
        ConfigError: on `output`: it names no file or one that exists, or its folder can't be written.
    """
    path = Path(output)
    if output == "" or os.path.isdir(path):
        raise ConfigError("output", output, "names no file", f"Name one, such as {such}")
    if os.path.exists(path) and not overwrite:
        remedy = "Name another file" if overwrite is None else "Add overwrite=true, or set another file"
        raise ConfigError("output", path, "exists", remedy)
    check_writable("output", path.parent, path)
    return path


class FolderLock:
    """Holds a lock file until `release` or until this process exits.

    It is a POSIX record lock, which children don't inherit: a forked writer that briefly outlives a killed run must
    not prevent a restart.

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
        except PermissionError as error:  # some systems raise this instead
            self._file.close()
            raise BlockingIOError(str(error)) from error

    def release(self) -> None:
        self._file.close()


def lock_folder(setting: str, folder: Path, name: str, busy: str) -> FolderLock:
    """Create a folder, and lock it against other processes.

    Args:
        setting: that names the folder.
        name: of the lock file in it.
        busy: says what another process does there.
    Raises:
        ConfigError: another process holds the lock, or the folder or the lock can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return FolderLock(folder / name)
    except BlockingIOError as error:
        raise ConfigError(setting, folder, busy, "Wait until it ends, or set another folder") from error
    except OSError as error:  # such as the lock of another user
        raise ConfigError(setting, folder, f"can't be written ({error})", "Set another folder") from error
