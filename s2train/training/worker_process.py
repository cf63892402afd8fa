"""Starts helper processes, which read a task from standard input."""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any


def worker_command(module: str) -> list[str]:
    """Return the command that calls a module's `main`.

    The process searches this one's path: `python -m` would look in the working directory first.
    """
    path = [str(folder) for folder in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"]


def start_worker(
    command: Sequence[str], task: object, stdout: IO[bytes] | int, stderr: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a process that takes the task by `read_task`.

    Raises:
        OSError: there is no memory for a process, or no place for temporary files.
    """
    with tempfile.TemporaryFile() as file:  # a pipe could fill up
        pickle.dump((os.getpid(), task), file)
        file.seek(0)
        return subprocess.Popen(command, stdin=file, stdout=stdout, stderr=stderr)


def read_task() -> Any:
    """Return this process's task; None if its parent has ended."""
    parent, task = pickle.load(sys.stdin.buffer)
    return task if os.getppid() == parent else None
