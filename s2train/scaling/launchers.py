"""Starts the ranks of a program by torchrun, or by forks.

Forks are of a process that has imported everything. Importing takes several seconds on each rank, and a minute if many
ranks first read the libraries from a disk.
"""

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, get_start_method, parent_process, set_start_method
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock, Thread
from unittest import mock

from torch.distributed import TCPStore
from torch.distributed.run import parse_args

from s2train.distributed.parent_death_signal import signal_on_parent_death
from s2train.distributed.torchrun_logs import without_log_folders


@dataclass(frozen=True)
class Launch:
    """A program to start on ranks.

    Attributes:
        program: a script and its arguments, or -m, a module and its arguments.
        processes: number of ranks.
        environment: of each rank.
        log: file of their output.
        timeout_s: the ranks are ended after this time.
        stopped: the ranks are ended when it is set.
    """

    program: Sequence[str]
    processes: int
    environment: Mapping[str, str]
    log: Path
    timeout_s: float
    stopped: Event = field(default_factory=Event)


# Starts the ranks and waits for them. Returns the first status that isn't 0, else 0; None if time ran out or the event
# is set.
Launcher = Callable[[Launch], int | None]

_CONTEXT = get_context("forkserver")
_LOCK = Lock()  # multiprocessing reads a process's status once, and may do so whenever another one starts
_SECONDS_TO_END = 10.0  # that ranks have after a signal
_SECONDS_TO_STOP = 0.5  # until an event is seen


def by_torchrun(launch: Launch) -> int | None:
    """Start the ranks by torchrun; a `Launcher`."""
    arguments = ["--standalone", "--nproc-per-node", str(launch.processes), *launch.program]
    with launch.log.open("w") as file, without_log_folders(parse_args(arguments)) as logs:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *logs, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=launch.environment,
            start_new_session=True,
            # otherwise torchrun and its ranks would hold the devices after this process is killed
            preexec_fn=partial(signal_on_parent_death, signal.SIGTERM),
        )
        until = time.monotonic() + launch.timeout_s
        try:
            while not launch.stopped.is_set() and (left := until - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(left, _SECONDS_TO_STOP))
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks
                process.wait()


def by_fork(launch: Launch) -> int | None:
    """Fork the ranks; a `Launcher`. Call `forks_problem` before."""
    launch.log.write_text("")
    size = str(launch.processes)
    # Held here, as torchrun does: another program could take a port that rank 0 listens on only after its imports.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks: list[BaseProcess] = [
        _CONTEXT.Process(
            target=_become_rank,
            args=(
                list(launch.program),
                {**launch.environment, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                str(launch.log),
                get_start_method(),
            ),
        )
        for rank in range(launch.processes)
    ]
    try:
        for rank in ranks:
            with _LOCK:
                rank.start()
        return _wait(ranks, time.monotonic() + launch.timeout_s, launch.stopped)
    finally:
        _end([rank for rank in ranks if rank.pid is not None])


def forks_problem(environment: Mapping[str, str]) -> str | None:
    """Start the process that imports everything, and try a fork.

    Returns why its forks can't be ranks, or None.

    A process that has initialised CUDA, as some libraries do when imported, can't be forked.

    Args:
        environment: of the process; its forks get others, but libraries read some variables when imported.
    """
    _CONTEXT.set_forkserver_preload(["s2train.scaling.preload"])
    with mock.patch.dict(os.environ, environment, clear=True):
        probe = _CONTEXT.Process(target=_probe)
        probe.start()
    probe.join()
    return None if probe.exitcode == 0 else f"a fork that tried the GPU ended with status {probe.exitcode}"


def _probe() -> None:
    import torch

    if "s2train.scaling.preload" not in sys.modules:
        raise ImportError("s2train.scaling.preload could not be imported")
    if torch.cuda.is_available():
        torch.ones(1, device="cuda").item()


def _become_rank(program: list[str], environment: dict[str, str], log: str, start_method: str) -> None:
    Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    set_start_method(start_method, force=True)  # else its workers would be forks of a server that imports for each rank
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(environment)  # beside what imports have set, such as inductor's number of threads
    added = environment.get("PYTHONPATH", "").split(os.pathsep)
    if program[0] == "-m":
        sys.argv, first = program[1:], os.getcwd()
    else:
        sys.argv, first = program, str(Path(program[0]).parent)
    sys.path[:] = [first, *(path for path in added if path and path not in sys.path), *sys.path]
    try:
        if program[0] == "-m":
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with_parent() -> None:
    """End this rank when the program that started it has been killed."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def _status(rank: BaseProcess) -> int | None:
    with _LOCK:
        return rank.exitcode


def _wait(ranks: Sequence[BaseProcess], until: float, stopped: Event) -> int | None:
    """Wait until all ranks have ended, or one has failed."""
    running = list(ranks)
    while running:
        left = until - time.monotonic()
        if not wait([rank.sentinel for rank in running], max(0.0, min(left, _SECONDS_TO_STOP))):
            if stopped.is_set() or left <= _SECONDS_TO_STOP:
                return None
            continue
        running = [rank for rank in running if _status(rank) is None]
        if failed := [status for rank in ranks if (status := _status(rank))]:
            return failed[0]
    return 0


def _end(ranks: Sequence[BaseProcess]) -> None:
    """End the ranks that still run."""
    running = [rank for rank in ranks if _status(rank) is None]
    for rank in running:
        rank.terminate()
    until = time.monotonic() + _SECONDS_TO_END
    for rank in running:
        wait([rank.sentinel], max(0.0, until - time.monotonic()))
        if _status(rank) is None:
            rank.kill()
            wait([rank.sentinel])
