"""Removes incomplete indices from Megatron's cache.

A killed job or a full disk may leave them. Megatron writes the files of an index in place, and uses an index whose
files all exist.
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
    """Remove indices with missing or unreadable files from a folder.

    Does not look into subfolders. Call it only while no other process builds there. Runs that have a file open keep
    reading its old content, which rewriting it in place would change.

    Returns:
        The files removed.
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
                with suppress(OSError):  # the file may belong to another user
                    path.unlink()
                    removed.append(path)
    return sorted(removed)


def _is_readable(path: Path) -> bool:
    """Whether a file's header and length are valid.

    Megatron never reads the description.
    """
    if path.suffix != ".npy":
        return True
    try:
        np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True
