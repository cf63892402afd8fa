"""Which process of a job prints its errors and warnings."""

import os
import sys


def prints_messages() -> bool:
    """Whether this process prints messages: rank 0, or an invalid rank."""
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return rank == "0" or not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks))


def warn(text: str) -> None:
    """Print a warning on rank 0's stderr."""
    if prints_messages():
        print(f"warning: {text}", file=sys.stderr, flush=True)
