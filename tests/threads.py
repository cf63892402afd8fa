"""Ranks of a job as threads of one process."""

import threading
from collections.abc import Callable


def in_threads(ranks: int, one: Callable[[int], None]) -> None:
    """Call `one` with each rank, side by side, until all have ended or time is up."""
    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
