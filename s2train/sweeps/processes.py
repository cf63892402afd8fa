"""Runs jobs as concurrent processes, and stops them on an interrupt.

Each job is a process group.
"""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from s2train.files import set_aside

_POLL_S = 0.2
_KILL_S = 5.0  # a killed process may take a moment to release its GPU


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        log: file for its output; an existing one is renamed.
    """

    arguments: Sequence[str]
    log: Path
    cwd: Path


def run_all(
    commands: Sequence[Command],
    environments: Sequence[dict[str, str]],
    on_start: Callable[[int], None],
    grace_s: float,
) -> Generator[tuple[int, int], None, None]:
    """Run commands concurrently, one per environment.

    Yields (index, exit status) as each ends. Ctrl-C, SIGTERM or leaving the iteration stops the running commands, first
    with SIGTERM and after `grace_s` seconds with SIGKILL. Ctrl-C and SIGTERM then raise KeyboardInterrupt.
    """
    waiting, free = deque(range(len(commands))), deque(environments)
    running: dict[int, tuple[subprocess.Popen[bytes], dict[str, str]]] = {}
    with _terminate_as_interrupt():
        try:
            while waiting or running:
                while waiting and free:
                    index, environment = waiting.popleft(), free.popleft()
                    running[index] = (_start(commands[index], environment), environment)
                    on_start(index)
                ended = [index for index, (process, _) in running.items() if process.poll() is not None]
                for index in ended:
                    process, environment = running.pop(index)
                    free.append(environment)
                    yield index, process.returncode
                if not ended:
                    time.sleep(_POLL_S)
        finally:
            stop([process for process, _ in running.values()], grace_s)


def _start(command: Command, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    command.log.parent.mkdir(parents=True, exist_ok=True)
    set_aside(command.log)
    with command.log.open("wb") as log:
        return subprocess.Popen(
            command.arguments,
            cwd=command.cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(processes: Sequence["subprocess.Popen[bytes]"], grace_s: float) -> None:
    """Stop processes and all their descendants."""
    family: list[psutil.Process] = []
    for process in processes:
        # torchrun's ranks are separate sessions, and would be orphaned if torchrun were killed.
        try:
            family += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGTERM)
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    with suppress(KeyboardInterrupt):  # a second Ctrl-C ends the grace period
        _wait(family, grace_s)
    for member in filter(_is_alive, family):
        with suppress(psutil.NoSuchProcess):
            member.kill()
    _wait(family, _KILL_S)
    for process in processes:
        process.poll()


def _wait(family: Sequence[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(_is_alive, family)):
        time.sleep(_POLL_S)


def _is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs.

    A zombie, as in a container without init, does not.
    """
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Make SIGTERM act like Ctrl-C instead of killing this process."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
