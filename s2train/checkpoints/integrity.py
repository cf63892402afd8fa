"""Checks a checkpoint's files for damage without loading its shards."""

import json
import pickletools
import traceback
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader

from s2train.errors import first_line
from s2train.kernels.versions import installed_version

CONFIG, PROGRESS, COMMON = "config.yaml", "progress.json", "common.pt"
_COMMON_IN_SHARDS = "common_state/"  # megatron-core 0.19 saves there what 0.16 writes to common.pt
_LOAD_FAILED = "load_failed.txt"
_LAST_SETTING = "plan"  # the last setting in config.yaml, in every version


def damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint in torch's distributed format.

    Reads the small files and the shards' sizes: it detects a missing or truncated file, but not a flipped bit in a
    shard. Returns None if it finds no damage, or if this torch can't read the index of a later one.
    """
    small: dict[str, Callable[[Path], None]] = {
        CONFIG: _check_yaml,
        PROGRESS: _check_json,
        "metadata.json": _check_json,
    }
    for name, check in small.items():
        if problem := _damage_of(checkpoint / name, check):
            return problem
    try:
        _check_memo(checkpoint / ".metadata")
        index = FileSystemReader(checkpoint).read_metadata()
        if not any(str(name).startswith(_COMMON_IN_SHARDS) for name in index.state_dict_metadata) and (
            problem := _damage_of(checkpoint / COMMON, _check_zip)
        ):
            return problem
        needed: dict[str, int] = defaultdict(int)
        for part in index.storage_data.values():
            needed[part.relative_path] = max(needed[part.relative_path], part.offset + part.length)
        for name, size in sorted(needed.items()):
            if not (checkpoint / name).is_file():
                return f"its shard {name} is missing"
            found = (checkpoint / name).stat().st_size
            if found < size:
                return f"its shard {name} is cut short: {found:,} of {size:,} bytes"
    except Exception as error:  # unpickling damaged bytes can raise any exception
        if later_torch(error):
            return None
        return f"its index .metadata can't be read ({type(error).__name__})"
    return None


def later_megatron(checkpoint: Path, entries: Collection[str]) -> str | None:
    """Say that a later megatron-core wrote a checkpoint, unreadable here.

    Megatron-core 0.19 and later keep all state in shards; earlier ones look for `common.pt`.

    Args:
        entries: names of what is in the shards.
    """
    installed = installed_version("megatron-core")
    if installed is None or tuple(map(int, installed.split(".")[:2])) >= (0, 19) or (checkpoint / COMMON).exists():
        return None
    if not any(name.startswith(_COMMON_IN_SHARDS) for name in entries):
        return None
    return f"megatron-core 0.19 or later wrote it, which {installed} here can't read"


def later_torch(error: Exception) -> str | None:
    """Say whether a later torch wrote an index that failed to load.

    Torch 2.15 and later save one property of tensors more, which earlier ones can't unpack.
    """
    unpacking = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, ValueError) and "too many values" in str(error) and unpacking.name == "__setstate__":
        return f"a later torch wrote it, which {torch.__version__} here can't read"
    return None


def _damage_of(file: Path, check: Callable[[Path], None]) -> str | None:
    if not file.is_file():
        return f"its {file.name} is missing"
    try:
        check(file)
    except Exception as error:  # the parsers raise many types; any of them makes the file unusable
        return f"its {file.name} can't be read ({first_line(error)})"
    return None


def known_problem(checkpoint: Path) -> str | None:
    """Known problem of a checkpoint: damage, or a failed load.

    A run may start from a checkpoint before one with a known problem. Returns None if there is none.
    """
    if problem := damage(checkpoint):
        return problem
    with suppress(OSError):
        return (checkpoint / _LOAD_FAILED).read_text().strip()
    return None


def record_failed_load(checkpoint: Path, problem: str) -> None:
    """Record in a checkpoint why loading it failed.

    `known_problem` reads the record. Any rank may write it. Runs can still start from the checkpoint, since the cause
    may lie elsewhere: a network file system, memory.
    """
    with suppress(OSError):
        (checkpoint / _LOAD_FAILED).write_text(problem + "\n")


def clear_failed_load(checkpoint: Path) -> None:
    """Remove the record of a failed load."""
    with suppress(OSError):
        (checkpoint / _LOAD_FAILED).unlink(missing_ok=True)


def _check_json(path: Path) -> None:
    if not isinstance(json.loads(path.read_text()), dict):
        raise ValueError("it holds no settings")


def _check_yaml(path: Path) -> None:
    # A truncated file would still be valid YAML, with fewer settings.
    if not path.read_text().endswith("\n"):
        raise ValueError("cut short")
    settings = OmegaConf.load(path)
    if not OmegaConf.is_dict(settings):
        raise ValueError("it holds no settings")
    if _LAST_SETTING not in settings:
        raise ValueError("cut short")


def _check_memo(path: Path) -> None:
    """Reject a pickle with a memo index larger than the file.

    One flipped bit can turn another opcode into LONG_BINPUT, whose index is the next four bytes. The unpickler would
    allocate memory for that index, tens of gigabytes, before it notices an error.
    """
    content = path.read_bytes()
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "LONG_BINPUT" and int(argument or 0) > len(content):
            raise ValueError(f"memo index {argument:,}")


def _check_zip(path: Path) -> None:
    """Verify the checksums of a zip file from torch.save, without unpickling it."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"its member {damaged} is damaged")
