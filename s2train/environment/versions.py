"""Returns versions of the relevant packages and of this code."""

import functools
import hashlib
import platform
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

import s2train
from s2train.kernels.versions import installed_version

_PACKAGES = ("megatron-core", "triton", "transformer-engine", "flash-attn-4", "liger-kernel")
_HERE = Path(__file__).parents[1]


def versions() -> dict[str, str]:
    """Return versions by name, including this code's; packages not installed are omitted."""
    # The packages of torch's CUDA builds at PyPI don't name CUDA's version; torch itself does.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        if (release := installed_version(package)) is not None:
            found[package] = release
    return found | {"s2train": f"{s2train.__version__}, sources {source_digest()}"}


@functools.cache
def source_digest() -> str:
    """Hash this package's sources, committed or not, to 12 hexadecimal digits.

    The sources are read once per process, since runs need the digest several times.
    """
    digest = hashlib.sha256()
    for folder in _folders():
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def git_commit() -> str | None:
    """Return the checkout's commit, plus `+changes` if files differ; None without git."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _folders() -> list[Path]:
    kernels = find_spec("s2train.kernels")
    assert kernels is not None
    assert kernels.origin is not None
    return [_HERE, Path(kernels.origin).parent]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_HERE), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
