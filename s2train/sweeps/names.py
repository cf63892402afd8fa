"""Names of a sweep's jobs: of their folders, and as people read them."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_READABLE_LENGTH = 80
_DIGEST_LENGTH = 8


def setting_and_value(override: str) -> tuple[str, str]:
    """`+model=tiny` → (`model`, `tiny`); (`x`, ``) for a deletion `~x`."""
    setting, _, value = override.lstrip("+~").partition("=")
    return setting, value


def folder_name(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """A name for a job's folder that a shell, a file system and Hydra take unquoted, at most 89 characters long.

    The swept settings and a digest of all overrides, which does not depend on their order: two jobs share a name only
    if they share all overrides.
    """
    words = [f"{setting.rpartition('.')[2]}-{value}" for setting, value in _swept(overrides, swept).items()]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "__".join(words))[:_READABLE_LENGTH].strip("-._")
    digest = hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:_DIGEST_LENGTH]
    return f"{readable or 'job'}-{digest}"


def job_folder(sweep_dir: Path, overrides: Sequence[str], swept: Iterable[str]) -> Path:
    """Where a job lives: the folder that has its digest already, whichever settings were swept then, or a new one."""
    name = folder_name(overrides, swept)
    digest = name[-_DIGEST_LENGTH - 1 :]
    return next((path for path in sorted(sweep_dir.glob(f"*{digest}")) if path.is_dir()), sweep_dir / name)


def label(overrides: Sequence[str], swept: Iterable[str]) -> str:
    """What tells a job from its sisters, as typed."""
    return " ".join(f"{setting}={value}" for setting, value in _swept(overrides, swept).items()) or "the only job"


def _swept(overrides: Sequence[str], swept: Iterable[str]) -> dict[str, str]:
    values = dict(setting_and_value(override) for override in overrides)
    return {setting: values[setting] for setting in swept if setting in values}
