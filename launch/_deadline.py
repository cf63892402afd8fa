"""Runs programs of launch/ until a time limit."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from s2train.command_line.commands import python_command

_LEAST_SECONDS = 40  # to start, do something and save
_OVER = "time limit reached; the same command resumes"


def minutes(text: str) -> float:
    """Parse an option's time limit.

    Raises:
        ArgumentTypeError: nothing could start in it.
    """
    value = float(text)  # argparse reports a ValueError
    if not 60 * value > _LEAST_SECONDS:
        raise ArgumentTypeError(f"{text} is too short to start anything, and would be so again: give 1 or more")
    return value


class Deadline:
    """Runs programs until the time is over, then ends with status 1.

    Starts nothing in the last moments.

    Args:
        environment: variables that the programs get in addition to those of this process.
    """

    def __init__(self, minutes: float, environment: Mapping[str, str] | None = None) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._environment = os.environ | dict(environment or {})

    @property
    def is_near(self) -> bool:
        """Whether too little time is left to start a program and save."""
        return time.monotonic() > self._end - _LEAST_SECONDS

    def run(self, command: list[str], record: Path | None = None) -> None:
        """Run a program of launch/; exits with its status if it fails.

        Args:
            record: JSON lines, to which its command, seconds and status are appended when it ends or is stopped.
        """
        started = time.monotonic()
        if self.is_near:
            sys.exit(_OVER)
        print(f"$ {python_command(*command)}", flush=True)
        is_over = False
        with _sigterm_raises():
            program = subprocess.Popen([sys.executable, *command], env=self._environment)
            try:
                program.wait(max(1.0, self._end - started))
            except subprocess.TimeoutExpired:
                is_over = True
                _stop([program])
            except SystemExit:
                _stop([program])
                raise
            except KeyboardInterrupt:  # the program has got the Ctrl-C too, and saves
                program.wait()
                raise
            finally:
                seconds = time.monotonic() - started
                if record:
                    _append(record, {"command": command, "seconds": round(seconds, 3), "status": program.poll()})
        print(f"# {seconds:.1f} s", flush=True)
        if is_over or program.returncode:
            sys.exit(_OVER if is_over else _status(program.returncode))

    def run_together(self, commands: list[list[str]], at_once: int) -> None:
        """Run programs of launch/ in parallel, `at_once` at a time.

        Exits if any fails, or when the time is over.
        """
        waiting: list[list[str]] = list(commands)
        running: list[subprocess.Popen[bytes]] = []
        try:
            with _sigterm_raises():
                while waiting or running:
                    while waiting and len(running) < at_once and not self.is_near:
                        print(f"$ {python_command(*waiting[0])}", flush=True)
                        running.append(subprocess.Popen([sys.executable, *waiting.pop(0)], env=self._environment))
                    status = None if time.monotonic() < self._end and (running or not self.is_near) else _OVER
                    for job in [job for job in running if job.poll() is not None]:
                        running.remove(job)
                        status = _status(job.returncode) or status
                    if status:
                        sys.exit(status)
                    time.sleep(0.2)
        finally:
            _stop(running)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Raise SystemExit on SIGTERM.

    SIGTERM would otherwise end this process, but not the programs that it started.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _status(returncode: int) -> int | str:
    """Return what to exit with.

    It is a message if a signal ended the program, which then printed none.
    """
    if returncode >= 0:
        return returncode
    why = ": if nobody sent it, memory ran out" if -returncode == signal.SIGKILL else ""
    return f"error: {signal.Signals(-returncode).name} ended the program{why}"


def _stop(programs: list[subprocess.Popen[bytes]]) -> None:
    """Terminate programs, and wait: training saves first."""
    for program in programs:
        program.terminate()
    for program in programs:
        program.wait()


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
