"""Runs CPU work in processes that end with this one."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

from s2train.errors import TrainingError

TOKENIZERS_PARALLELISM = "TOKENIZERS_PARALLELISM"  # the tokenizers library reads it in every call


@contextmanager
def worker_pool(
    workers: int, start: Callable[..., None] | None = None, *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of `workers` processes.

    Leaving the context cancels tasks that have not begun. Workers are spawned, because the threads of torch and of
    tokenizers would not survive a fork. They exit when this process is killed, and tokenize on one core.

    Args:
        start: called with `arguments` once in every worker.

    Raises:
        TrainingError: a worker was killed.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise TrainingError(
            "a worker was killed, perhaps because memory ran out. Run the same command with fewer workers to resume"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    os.environ[TOKENIZERS_PARALLELISM] = "false"
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if start is not None:
        start(*arguments)
