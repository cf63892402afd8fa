"""Starts the helper process for Megatron's asynchronous checkpoint writers."""

import os
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from s2train.distributed.parent_death_signal import signal_on_parent_death

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def start_results_manager() -> SyncManager:
    """Start the process through which forked writers return their results.

    It replaces Megatron's, which outlives a killed rank, and which dies from the SIGTERM that torchrun sends to a
    rank's whole process group, so that the rank could no longer save. Keep the manager until the last save is done.
    """
    # Orphaned writers would hold GPU memory that restarted ranks need.
    os.register_at_fork(after_in_child=signal_on_parent_death)
    manager = SyncManager(ctx=get_context("fork"))
    resource_tracker.ensure_running()  # otherwise starting the manager starts it too, and then unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the new process inherits the mask
    try:
        manager.start(initializer=signal_on_parent_death)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    filesystem_async._results_queue = manager.Queue()
    _raise_writer_errors()
    return manager


def _raise_writer_errors() -> None:
    """Raise errors of a writer that runs in the saving process.

    megatron-core 0.19 would report only its class.
    """
    writer = filesystem_async.FileSystemWriterAsync
    write = writer.write_preloaded_data
    if isinstance(write, partial):  # already patched
        return

    writer.write_preloaded_data = staticmethod(partial(_write_or_raise, write))


def _write_or_raise(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    outcome = write(*args, **kwargs)
    if outcome is not None and isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome
