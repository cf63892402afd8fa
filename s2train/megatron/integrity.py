"""Whether a checkpoint's files are all there and as long as they were written, without loading them."""

import pickle
from collections import defaultdict
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint in torch's distributed format, in a few words; None: nothing to be seen.

    Reads the index and the files' sizes: a missing or truncated shard is found, a flipped bit is not.
    """
    try:
        storage = FileSystemReader(checkpoint).read_metadata().storage_data
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, ValueError) as error:
        return f"its index .metadata can't be read ({type(error).__name__})"
    needed: dict[str, int] = defaultdict(int)
    for part in storage.values():
        needed[part.relative_path] = max(needed[part.relative_path], part.offset + part.length)
    for name, size in sorted(needed.items()):
        if not (checkpoint / name).is_file():
            return f"its shard {name} is missing"
        found = (checkpoint / name).stat().st_size
        if found < size:
            return f"its shard {name} is cut short: {found:,} of {size:,} bytes"
    if not (checkpoint / "metadata.json").is_file():
        return "its metadata.json is missing"
    return None
