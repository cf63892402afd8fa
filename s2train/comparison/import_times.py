"""What a program's imports take, by package, and what a file costs here."""

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

# "import time:   own us |  with what it imports | name"
_LINE = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \| +(\S+)$", re.MULTILINE)
_ROWS = 20


@dataclass(frozen=True)
class PackageTime:
    """Modules of a package, and seconds that they took themselves."""

    package: str
    modules: int
    seconds: float


def import_times(command: Sequence[str]) -> list[PackageTime]:
    """Run a Python program under `-X importtime`; its packages, slowest first.

    Imports in several threads at once count what they wait for each other, too.

    Raises:
        TrainingError: the program failed.
    """
    surrounding = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, env=surrounding, capture_output=True, text=True)
    if done.returncode:
        told = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
        raise TrainingError(f"under -X importtime it ended with status {done.returncode}: {told[-1500:]}")
    return by_package(done.stderr)


def by_package(report: str) -> list[PackageTime]:
    """Sum what `-X importtime` wrote, by top-level package; slowest first."""
    found: dict[str, list[int]] = {}
    for own, name in _LINE.findall(report):
        found.setdefault(name.partition(".")[0], []).append(int(own))
    times = [PackageTime(package, len(own), sum(own) / 1e6) for package, own in found.items()]
    return sorted(times, key=lambda one: -one.seconds)


def table_of_imports(times: Sequence[PackageTime]) -> Table:
    """The slowest packages, and the sum of all."""
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
    """Seconds to ask for a file's size, and to open and read it: means over torch's compiled modules, once read."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))[:500]
    for path in files:
        path.read_bytes()
    began = time.perf_counter()
    for path in files:
        path.stat()
    asked = time.perf_counter()
    for path in files:
        path.read_bytes()
    return (asked - began) / len(files), (time.perf_counter() - asked) / len(files)
