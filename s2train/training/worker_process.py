"""Starts helper processes, which read a task from standard input."""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO


def worker_command(module: str) -> list[str]:
    """Return the command that calls a module's `main`.

    The process searches this one's path: `python -m` would look in the working directory first.
    """
    path = [str(folder) for folder in sys.path]
    return [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}; from {module} import main; main()"]


def start_worker(
    command: Sequence[str], task: object, stdout: IO[bytes] | int, stderr: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a process that finds the pickled task in its standard input.

    Raises:
        OSError: there is no memory for a process, or no place for temporary files.
    """
    with tempfile.TemporaryFile() as file:  # a pipe could fill up
        file.write(pickle.dumps(task))
        file.seek(0)
        return subprocess.Popen(command, stdin=file, stdout=stdout, stderr=stderr)
