"""Names the folders of a sweep's jobs, and labels the jobs."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from s2train.command_line.old_names import OLD_NAMES, renamed

_READABLE_LENGTH = 80
_DIGEST_LENGTH = 8


def setting_and_value(override: str) -> tuple[str, str]:
    """Split an override into setting and value.

    `+model=tiny` → (`model`, `tiny`); a deletion `~x` → (`x`, ``).
    """
    setting, _, value = override.lstrip("+~").partition("=")
    return setting, value


def folder_name(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """Build a folder name that needs no quoting.

    It has at most 89 characters, and a shell, a file system and Hydra accept it unquoted. It consists of the swept
    settings and a digest of all overrides that does not depend on their order: two jobs share a name only if they share
    all overrides.
    """
    words = [f"{setting.rpartition('.')[2]}-{value}" for setting, value in _swept(overrides, swept).items()]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "__".join(words))[:_READABLE_LENGTH].strip("-._")
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{readable or 'job'}-{digest}"


def job_folder(sweep_dir: Path, overrides: Sequence[str], swept: Iterable[str]) -> Path:
    """Return a job's folder, an existing one if it has its digest.

    The existing folder may come from a sweep of other settings, or of a version with other names for settings.
    """
    name = folder_name(overrides, swept)
    earlier = renamed(overrides, {new: old for old, new in OLD_NAMES.items()})
    for named in (name, folder_name(earlier, ())):
        digest = named[-_DIGEST_LENGTH - 1 :]
        if there := [path for path in sorted(sweep_dir.glob(f"*{digest}")) if path.is_dir()]:
            return there[0]
    return sweep_dir / name


def label(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """Label of a job: the swept settings as typed."""
    return " ".join(f"{setting}={value}" for setting, value in _swept(overrides, swept).items()) or "the only job"


def _swept(overrides: Sequence[str], swept: Iterable[str]) -> dict[str, str]:
    values = dict(setting_and_value(override) for override in overrides)
    return {setting: values[setting] for setting in swept if setting in values}
