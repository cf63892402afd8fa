"""Where compiled kernels are kept between runs: Triton's, and those that torch.compile makes."""

import os
import tempfile
from pathlib import Path


def keep_kernels() -> list[str]:
    """Name the folders to Triton and to inductor; before either compiles. Every process of a machine names the same.

    Triton's is its own default, ~/.triton/cache, also for the kernels of inductor, whose default is a temporary folder.
    `TRITON_CACHE_DIR`, `TRITON_HOME` and `TORCHINDUCTOR_CACHE_DIR` name others. Where one can't be written, a temporary
    folder takes its place.

    Returns:
        A line on each folder that can't be written.
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
                f"compiled kernels can't be kept in {folder} ({problem}), and are in {instead} instead: set {name} to a"
                " folder that lasts, or each new machine compiles again"
            )
            folder = instead
        os.environ[name] = str(folder)
    return lines


def _problem(folder: Path) -> str | None:
    """Why a folder, made here if need be, can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
