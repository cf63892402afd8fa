"""Whether a checkpoint's files are all there and as they were written, without loading its shards."""

import json
import pickletools
import zipfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader

CONFIG, PROGRESS, COMMON = "config.yaml", "progress.json", "common.pt"
_COMMON_IN_SHARDS = "common_state/"  # megatron-core 0.19 keeps there what 0.16 writes to common.pt
_LOAD_FAILED = "load_failed.txt"
_LAST_SETTING = "plan"  # of a run's settings, in every version


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint in torch's distributed format, in a few words; None: nothing to be seen.

    Reads the small files and the shards' sizes: a missing or truncated file is found, a flipped bit in a shard is not.
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
    except Exception as error:  # a pickle: a flipped bit can end in any of them, and in names that are none
        return f"its index .metadata can't be read ({type(error).__name__})"
    return None


def _damage_of(file: Path, check: Callable[[Path], None]) -> str | None:
    if not file.is_file():
        return f"its {file.name} is missing"
    try:
        check(file)
    except Exception as error:  # many kinds; whatever it is, the file is none to start from
        return f"its {file.name} can't be read ({_first_line(error)})"
    return None


def doubt(checkpoint: Path) -> str | None:
    """Why a run may go back behind a checkpoint: its damage, or that a run could not load it; None: nothing known."""
    if problem := damage(checkpoint):
        return problem
    with suppress(OSError):
        return (checkpoint / _LOAD_FAILED).read_text().strip()
    return None


def note_failed_load(checkpoint: Path, problem: str) -> None:
    """Keep with a checkpoint why it could not be loaded, for `doubt`; any rank's work.

    It stays a checkpoint to start from, since the fault may have been another: a network file system, memory.
    """
    with suppress(OSError):
        (checkpoint / _LOAD_FAILED).write_text(problem + "\n")


def forget_failed_load(checkpoint: Path) -> None:
    """It could be loaded after all."""
    with suppress(OSError):
        (checkpoint / _LOAD_FAILED).unlink(missing_ok=True)


def _check_json(path: Path) -> None:
    if not isinstance(json.loads(path.read_text()), dict):
        raise ValueError("no settings in it")


def _check_yaml(path: Path) -> None:
    # Cut anywhere it would be YAML still, of fewer settings.
    if not path.read_text().endswith("\n"):
        raise ValueError("cut short")
    settings = OmegaConf.load(path)
    if not OmegaConf.is_dict(settings):
        raise ValueError("no settings in it")
    if _LAST_SETTING not in settings:
        raise ValueError("cut short")


def _check_memo(path: Path) -> None:
    """A pickle's numbered objects are no more than its bytes.

    One flipped bit makes an operation of another kind "remember this as number n", n being the next four bytes: the
    unpickler makes room for n, tens of gigabytes, before it sees anything wrong.
    """
    content = path.read_bytes()
    for operation, argument, _ in pickletools.genops(content):
        if operation.name == "LONG_BINPUT" and int(argument or 0) > len(content):
            raise ValueError(f"an object numbered {argument:,}")


def _check_zip(path: Path) -> None:
    """What torch.save writes: a zip file, whose sums are checked without unpickling anything."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} in it is damaged")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
