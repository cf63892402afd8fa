"""Megatron's cached indices: what a kill or a full disk left of a set half written is removed, to be built again.

Megatron writes them in place, and takes a set whose files are all there for whole.
"""

import re
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

_GPT = frozenset({"description.txt", "document_index.npy", "sample_index.npy", "shuffle_index.npy"})
_SETS = {
    "GPTDataset": _GPT,
    "MockGPTDataset": _GPT,
    "BlendedDataset": frozenset({"description.txt", "dataset_index.npy", "dataset_sample_index.npy"}),
}
_NAME = re.compile(rf"([0-9a-f]{{32}}-({'|'.join(_SETS)})-[a-z]+)-(\w+\.(?:txt|npy))")


def remove_broken_sets(folder: Path) -> list[Path]:
    """Remove the sets of a folder, not of those in it, that lack a file or have one that can't be read.

    For a process that alone builds there. Runs that have a file open keep it, which writing in place would change.

    Returns:
        the files removed.
    """
    sets: dict[tuple[str, str], dict[str, Path]] = defaultdict(dict)
    for path in folder.glob("*-*-*-*"):
        if match := _NAME.fullmatch(path.name):
            base, kind, part = match.groups()
            sets[base, kind][part] = path
    removed = []
    for (_, kind), files in sets.items():
        if not (files.keys() >= _SETS[kind] and all(map(_is_readable, files.values()))):
            for path in files.values():
                with suppress(OSError):  # another user's
                    path.unlink()
                    removed.append(path)
    return sorted(removed)


def _is_readable(path: Path) -> bool:
    """As far as its length and header tell; nobody reads the description."""
    if path.suffix != ".npy":
        return True
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True
