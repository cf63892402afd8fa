"""Finds results of an earlier command with the same options."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2train.command_line.messages import warn
from s2train.command_line.program import option_name
from s2train.errors import ConfigError, as_typed
from s2train.files import output_stem, write_json

Asked = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """What a command with an OUTPUT keeps.

    Attributes:
        given: OUTPUT as typed.
        results: OUTPUT.json.
        jobs: OUTPUT.jobs.json, results of finished runs.
        runs: folder of runs and logs.
    """

    given: Path
    results: Path
    jobs: Path
    runs: Path

    @classmethod
    def of(cls, given: Path) -> "Kept":
        """Name the files of an OUTPUT.

        Raises:
            ConfigError: it names no file.
        """
        output = output_stem(given, "OUTPUT")
        results, jobs = (output.with_name(output.name + suffix) for suffix in (".json", ".jobs.json"))
        return cls(given, results, jobs, Path("runs") / f"scaling-{output.name}")

    def earlier(self, asked: Asked) -> dict[str, Any]:
        """Return the results to continue with; {} if there are none.

        Raises:
            ConfigError: what is there is of other options, of another OUTPUT, or of unknown ones.
        """
        content: dict[str, Any] = {}
        if self.jobs.exists():
            self._content(self.jobs)
        if self.results.exists():
            content = self._content(self.results)
            self._check_asked(self.results, content.get("asked"), asked)
        if self.runs.exists():
            ran = self._content(self._ran) if self._ran.is_file() else {}
            output, options = ran.pop("output", self._output), ran.pop("options", ran)
            if output != self._output:
                raise self._there(self.runs, f", of OUTPUT={output}")
            self._check_asked(self.runs, options, asked)
        elif self.jobs.exists() and not content:
            raise self._there(self.jobs, f" without {self.results}, so that nothing says of which options it is")
        return content

    def begin(self, asked: Asked, content: Mapping[str, Any]) -> None:
        """Write the options, before the first run."""
        write_json(self._ran, {"output": self._output, "options": asked})
        write_json(self.results, content)

    @property
    def _ran(self) -> Path:
        return self.runs / "asked.json"

    @property
    def _output(self) -> str:
        return os.path.relpath(self.results)  # the folder of both may be moved

    def _content(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError):
            content = None
        if not isinstance(content, dict):
            raise self._there(path, ", and is not of this program")
        return content

    def _check_asked(self, path: Path, earlier: object, asked: Asked) -> None:
        if not isinstance(earlier, Mapping) or not earlier:
            raise self._there(path, ", and doesn't say of which options it is")
        different = [
            said
            for name in {**earlier, **asked}
            if earlier.get(name) != asked.get(name)
            for said in _difference(name, earlier.get(name), asked.get(name))
        ]
        if different:
            raise self._there(path, f", of {', '.join(different)}")

    def _there(self, path: Path, what: str) -> ConfigError:
        return ConfigError("OUTPUT", self.given, f"{path} exists{what}", "Name another, or move it away")


def measured_with(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return hardware and versions of results that this command adds to.

    Those of the first command stay. What differs now is added under `resumed_with`.
    """
    first = {name: earlier.get(name, value) for name, value in now.items()}
    changed = {name: value for name, value in now.items() if value != first[name]}
    if "device" in changed:
        warn(f"earlier results were measured on {first['device']}, and this is {now['device']}: don't compare the two")
    later = list(earlier.get("resumed_with", []))
    if changed.keys() - {"date"} and changed not in later:
        later.append(changed)
    return first | ({"resumed_with": later} if later else {})


def _difference(name: str, earlier: Any, now: Any) -> Iterator[str]:
    """Say how an earlier option differs, as on the command line."""
    if name != "settings":
        option = option_name(name)
        yield f"no {option}" if earlier is None else f"{option}={as_typed(earlier)}"
    elif sorted(earlier) == sorted(now):
        yield f"settings in another order: {' '.join(earlier)}"
    else:
        yield from (setting for setting in earlier if setting not in now)
        yield from (f"no {setting}" for setting in now if setting not in earlier)
