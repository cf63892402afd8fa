"""The processes that write a checkpoint's shards for Megatron."""

import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from s2train.distributed.parent_death_signal import end_with_the_parent

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def start_results_manager() -> SyncManager:
    """Start the process through which forked writers answer, in place of the one Megatron would start.

    Megatron's lives on when its rank is killed, and dies of the SIGTERM that torchrun sends to a rank's whole process
    group, so that the rank could not save any more. Keep the manager as long as something is saved.
    """
    # Orphaned writers would keep the GPU's memory from the ranks that come after.
    os.register_at_fork(after_in_child=end_with_the_parent)
    manager = SyncManager(ctx=get_context("fork"))
    resource_tracker.ensure_running()  # else the manager's start would start it, and unblock SIGTERM afterwards
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the new process inherits it
    try:
        manager.start(initializer=end_with_the_parent)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    filesystem_async._results_queue = manager.Queue()
    _let_writers_say_why()
    return manager


def _let_writers_say_why() -> None:
    """megatron-core 0.19 would tell only the class of an error in the writer that runs in the saving process itself."""
    writer = filesystem_async.FileSystemWriterAsync
    write = writer.write_preloaded_data
    if isinstance(write, partial):  # done before
        return

    writer.write_preloaded_data = staticmethod(partial(_write_or_raise, write))


def _write_or_raise(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outcome = write(*args, **kwargs)
    if outcome is not None and isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome
