"""Chooses the folders that cache compiled kernels between runs (Triton's and torch.compile's)."""

import os
import tempfile
from pathlib import Path

from s2train.wandb_run import say


def use_cache_folders() -> None:
    """Set the cache folders; a machine's first rank prints the warnings."""
    warnings = set_cache_folders()
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for warning in warnings:
            say(warning)


def set_cache_folders() -> list[str]:
    """Set the cache folders of Triton and inductor through environment variables.

    Call before either compiles. Every process of a machine chooses the same folders. Triton's is its own default,
    ~/.triton/cache, and serves inductor's Triton kernels too; inductor's own default would be a temporary folder.
    `TRITON_CACHE_DIR`, `TRITON_HOME` and `TORCHINDUCTOR_CACHE_DIR` override them. A folder that can't be written is
    replaced by a temporary one.

    Returns:
        One warning for each folder that can't be written.
    """
    home = Path(os.path.expanduser("~"))
    defaults = {
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_HOME") or home) / ".triton" / "cache",
        "TORCHINDUCTOR_CACHE_DIR": Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "torchinductor",
    }
    lines = []
    for name, default in defaults.items():
        folder = Path(os.environ.get(name) or default)
        if (problem := _problem(folder)) is not None:
            instead = Path(tempfile.gettempdir()) / f"s2train_kernels_{os.getuid()}" / folder.name
            lines.append(
                f"compiled kernels can't be cached in {folder} ({problem}) and are cached in {instead} instead. Set"
                f" {name} to a persistent folder, or each new machine compiles them again"
            )
            folder = instead
        os.environ[name] = str(folder)
    return lines


def _problem(folder: Path) -> str | None:
    """Why a folder can't be written, or None.

    Creates the folder if it is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
