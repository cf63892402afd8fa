"""Keeps results of finished jobs, to resume an interrupted measurement."""

import json
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from s2train.distributed.agreement import over_ranks
from s2train.files import reading, write_json

Result = dict[str, Any]


class Recorded:
    """Results by name in a JSON file, replaced after each change.

    Args:
        path: read if it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, Lock()
        self._results: dict[str, Result] = {}
        self.read()

    def read(self) -> None:
        """Read the file again, after another process has written it.

        Raises:
            ConfigError: it holds something else.
        """
        if self.path.is_file():
            with reading("OUTPUT", self.path):
                self._results = dict(json.loads(self.path.read_text()))

    def get(self, name: str) -> Result | None:
        """Return a result; None if the job has not finished."""
        return self._results.get(name)

    def add(self, name: str, result: Result) -> None:
        """Write a result, in place of an earlier one of that name."""
        with self._lock:
            self._results[name] = result
            self._write()

    def forget(self, is_outdated: Callable[[Result], bool]) -> None:
        """Remove results."""
        with self._lock:
            self._results = {name: found for name, found in self._results.items() if not is_outdated(found)}
            self._write()

    def on_all_ranks(self, name: str, measure: Callable[[], Result]) -> Result:
        """Return a recorded result, or measure it on all ranks."""
        found: Any = over_ranks(self.get(name))[0]
        if found is None:
            found = measure()
            if torch.distributed.get_rank() == 0:
                self.add(name, found)
        result: Result = found
        return result

    def _write(self) -> None:
        write_json(self.path, self._results)
