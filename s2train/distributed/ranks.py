"""Reads a process's place in its job from torchrun's variables."""

import os


def world_size() -> int:
    """Return the number of ranks; without torchrun there is one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_0() -> bool:
    """Whether this process is rank 0, as without torchrun."""
    return os.environ.get("RANK", "0") == "0"
