"""Measures import times by package, and the time to access a file."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from s2train.errors import TrainingError

# "import time:   self us |  cumulative us | name"
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$", re.MULTILINE)
_ROWS = 20


@dataclass(frozen=True)
class PackageTime:
    """Modules of a package, and the seconds of their own imports."""

    package: str
    modules: int
    seconds: float


def import_times(command: Sequence[str]) -> list[PackageTime]:
    """Run a program under `-X importtime`, and list its packages.

    The slowest comes first. Concurrent imports in several threads include the time that they wait for each other.

    Raises:
        TrainingError: the program failed.
    """
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
        raise TrainingError(f"under -X importtime it ended with status {done.returncode}: {output[-1500:]}")
    return by_package(done.stderr)


def by_package(report: str) -> list[PackageTime]:
    """Sum the output of `-X importtime` by top-level package, slowest first."""
    found: dict[str, list[int]] = {}
    for own, name in _LINE.findall(report):
        found.setdefault(name.partition(".")[0], []).append(int(own))
    times = [PackageTime(package, len(own), sum(own) / 1e6) for package, own in found.items()]
    return sorted(times, key=lambda one: -one.seconds)


def table_of_imports(times: Sequence[PackageTime]) -> Table:
    """Make a table of the slowest packages and the total."""
    table = Table("package", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("modules", justify="right")
    table.add_column("seconds", justify="right")
    rest = times[_ROWS:]
    shown = list(times[:_ROWS])
    if rest:
        shown.append(PackageTime(f"{len(rest)} others", sum(o.modules for o in rest), sum(o.seconds for o in rest)))
    for one in shown:
        table.add_row(one.package, str(one.modules), f"{one.seconds:.2f}")
    table.add_section()
    table.add_row("all", str(sum(one.modules for one in times)), f"{sum(one.seconds for one in times):.2f}")
    return table


def file_seconds() -> tuple[float, float]:
    """Measure mean seconds to stat a file, and to read it.

    Uses torch's modules, after reading them once.
    """
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))[:500]
    for path in files:
        path.read_bytes()
    began = time.perf_counter()
    for path in files:
        path.stat()
    stat_done = time.perf_counter()
    for path in files:
        path.read_bytes()
    return (stat_done - began) / len(files), (time.perf_counter() - stat_done) / len(files)
