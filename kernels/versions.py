"""Looks up the installed versions of optional libraries."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def installed_version(package: str) -> str | None:
    """Return a package's installed version, or None; imports nothing of it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
