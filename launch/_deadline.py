"""Runs programs of launch/ until a time limit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LEAST_SECONDS = 40  # to start, do something and save
_OVER = "time limit reached; the same command resumes"


class Deadline:
    """Runs programs until the time is over, and ends with status 1 then. Nothing is started in the last moments.

    Args:
        environment: variables that the programs get beside those of this process.
    """

    def __init__(self, minutes: float, environment: Mapping[str, str] | None = None) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._environment = os.environ | dict(environment or {})

    @property
    def is_near(self) -> bool:
        """Whether too little is left to start a program in, and to save."""
        return time.monotonic() > self._end - _LEAST_SECONDS

    def run(self, command: list[str], record: Path | None = None) -> None:
        """Run a program of launch/; exits with its status if it fails.

        Args:
            record: JSON lines, to which its command, seconds and status are appended when it ends or is stopped.
        """
        started = time.monotonic()
        if self.is_near:
            sys.exit(_OVER)
        print("$ python", " ".join(command), flush=True)
        program, is_over = subprocess.Popen([sys.executable, *command], env=self._environment), False
        try:
            program.wait(max(1.0, self._end - started))
        except subprocess.TimeoutExpired:
            is_over = True
            program.terminate()  # training saves first
            program.wait()
        except KeyboardInterrupt:  # the program has got the Ctrl-C too, and saves
            program.wait()
            raise
        finally:
            seconds = time.monotonic() - started
            if record:
                _append(record, {"command": command, "seconds": round(seconds, 3), "status": program.poll()})
        print(f"# {seconds:.1f} s", flush=True)
        if is_over or program.returncode:
            sys.exit(_OVER if is_over else program.returncode)

    def run_together(self, commands: list[list[str]], at_once: int) -> None:
        """Run programs of launch/ side by side; exits if any fails, or the time is over."""
        waiting, running = list(commands), []
        while waiting or running:
            while waiting and len(running) < at_once and not self.is_near:
                print("$ python", " ".join(waiting[0]), flush=True)
                running.append(subprocess.Popen([sys.executable, *waiting.pop(0)], env=self._environment))
            status = None if time.monotonic() < self._end and (running or not self.is_near) else _OVER
            for job in [job for job in running if job.poll() is not None]:
                running.remove(job)
                status = job.returncode or status
            if status:
                for job in running:
                    job.terminate()
                for job in running:
                    job.wait()
                sys.exit(status)
            time.sleep(0.2)


def _append(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
