"""Measures the time from launch to step 1.

`python -m s2train.comparison.starts +model=NAME [setting=value …]`

Starts a run several times up to its first step, and prints the parts of each start. Cold starts have empty caches of
compiled kernels and dataset indices; warm ones use the caches of the last cold one. (The operating system's file cache
is not controlled: the first start after boot is colder. Neither is Python's byte code: the table says how many modules
have none.) Nothing is saved.
"""

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from s2train.command_line.program import option_name, run_command, settings_before_options
from s2train.comparison.import_times import file_seconds, import_times, table_of_imports
from s2train.environment.provenance import environment
from s2train.errors import ConfigError, TrainingError
from s2train.files import check_writable, write_json
from s2train.training.records import read_records

_LAUNCH = Path(__file__).parents[2] / "launch"
_SETTINGS = (
    "train.exit_step=1",
    "checkpoint.save=false",
    "checkpoint.resume=never",
    "evaluation.interval=0",
    "tracking.wandb=disabled",
)
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


@dataclass(frozen=True)
class Start:
    """Measurements of one start.

    Attributes:
        name: such as "cold 1".
        total_s: seconds from launch to the end of step 1, measured outside the run.
        seconds: seconds of each part, measured by the run.
        modules: number of modules imported by rank 0.
        without_byte_code: number of those that each start compiles.
    """

    name: str
    total_s: float
    seconds: dict[str, float]
    modules: int
    without_byte_code: int


@dataclass(frozen=True)
class Request:
    """What to start.

    Attributes:
        overrides: settings of the run.
        processes: ranks on this machine, started by launch/job.py; 0: plain python.
    """

    overrides: Sequence[str]
    processes: int

    def command(self, folder: Path, caches: Path) -> list[str]:
        """Build the command of one start into `folder`."""
        job = [str(_LAUNCH / "job.py"), "--nproc-per-node", str(self.processes)] if self.processes else []
        settings = [*_SETTINGS, f"data.cache={caches / 'indices'}", f"run_dir={folder}", *self.overrides]
        return [sys.executable, *job, str(_LAUNCH / "pretrain.py"), *settings]


def measure(request: Request, name: str, folder: Path, caches: Path) -> Start:
    """Start a run up to its first step, and wait.

    Args:
        folder: run folder, which must not exist.
        caches: folder of compiled kernels and dataset indices.
    Raises:
        TrainingError: the run failed.
    """
    variables = os.environ | {name: str(caches / name.lower()) for name in _CACHES}
    began = time.time()
    done = subprocess.run(request.command(folder, caches), env=variables, capture_output=True, text=True)
    if done.returncode:
        raise TrainingError(f"{name}: the run ended with status {done.returncode}: {done.stderr[-1500:].strip()}")
    (event,) = [e for e in read_records(folder / "metrics.jsonl") if e.get("event") == "first step"]
    ended = datetime.fromisoformat(event["time"]).timestamp()
    return Start(name, ended - began, event["seconds"], event["modules"], event["without_byte_code"])


def measure_all(
    request: Request, cold: int, warm: int, together: int, keep: Callable[[list[Start]], None]
) -> list[Start]:
    """Measure cold starts, then warm ones, `together` at a time.

    `keep` gets all starts so far after each group.
    """
    starts: list[Start] = []
    with tempfile.TemporaryDirectory(prefix="s2train_starts_") as scratch, ThreadPoolExecutor(together) as pool:
        root, caches = Path(scratch), Path(scratch) / "warm"
        for kind, count in (("cold", cold), ("warm", warm)):
            for number in range(1, count + 1):
                if kind == "cold":
                    caches = root / f"caches {number}"
                names = [
                    f"{kind} {number}" + (f" ({i} of {together})" if together > 1 else "")
                    for i in range(1, together + 1)
                ]
                jobs = [pool.submit(measure, request, name, root / name.replace(" ", "_"), caches) for name in names]
                starts += [job.result() for job in jobs]
                print(f"{kind} {number}: {', '.join(f'{s.total_s:.1f} s' for s in starts[-together:])}", flush=True)
                keep(starts)
    return starts


def table(starts: Sequence[Start]) -> Table:
    """Make a table of the seconds of each part.

    It has a column for each start, and one for the median of each kind with several starts.
    """
    kinds = {kind: [s for s in starts if s.name.startswith(kind)] for kind in ("cold", "warm")}
    medians = [kind for kind, members in kinds.items() if len(members) > 1]
    made = Table("seconds", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in [*(start.name for start in starts), *(f"{kind} median" for kind in medians)]:
        made.add_column(name, justify="right")

    def row(title: str, values: Sequence[float], medianed: Sequence[float], form: str = ".2f") -> None:
        made.add_row(title, *(format(value, form) for value in (*values, *medianed)))

    parts = list(dict.fromkeys(part for start in starts for part in start.seconds))
    for part in parts:
        of = [start.seconds.get(part, 0.0) for start in starts]
        row(part, of, [statistics.median(s.seconds.get(part, 0.0) for s in kinds[kind]) for kind in medians])
    made.add_section()
    totals = [statistics.median(s.total_s for s in kinds[kind]) for kind in medians]
    row("launch to step 1", [start.total_s for start in starts], totals)
    for title in ("modules", "without_byte_code"):
        of = [getattr(start, title) for start in starts]
        middle = [statistics.median(getattr(s, title) for s in kinds[kind]) for kind in medians]
        row(title.replace("_", " "), of, middle, ".0f")
    return made


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings of the run")
    parser.add_argument("--starts", type=int, default=3, help="warm starts")
    parser.add_argument("--cold", type=int, default=1, help="cold starts, before the warm ones")
    parser.add_argument(
        "--nproc-per-node", type=int, default=0, help="ranks, started by launch/job.py; 0: plain python"
    )
    parser.add_argument("--together", type=int, default=1, help="concurrent runs")
    parser.add_argument("--imports", action="store_true", help="measure the imports of one more start, by package")
    parser.add_argument("--output", type=Path, help="a .json file for the results")
    given = parser.parse_intermixed_args(settings_before_options(sys.argv[1:]))
    run_command(lambda: measure_and_show(given))


def measure_and_show(given: argparse.Namespace) -> None:
    """Measure, print the table, and write the requested file."""
    for name in ("starts", "cold", "nproc_per_node"):
        if getattr(given, name) < 0:
            raise ConfigError(option_name(name), getattr(given, name), "is negative", "Set 0 or more")
    if given.together < 1 or given.starts + given.cold < 1:
        raise ConfigError(
            "--starts", given.starts, "nothing would be started", "Set --starts or --cold, and --together"
        )
    if given.output is not None:
        check_writable("--output", given.output.parent)
    request = Request(given.overrides, given.nproc_per_node)
    console = Console(width=int(os.environ.get("COLUMNS", "160")))
    command = {"command": shlex.join(["python", *sys.orig_argv[1:]])}

    def keep(starts: Sequence[Start], **more: object) -> None:
        if given.output is not None:
            content = {**command, **more, "starts": [asdict(start) for start in starts]}
            write_json(given.output, content)

    starts = measure_all(request, given.cold, given.starts, given.together, keep)
    console.print(table(starts))
    asking, opening = file_seconds()
    print(f"stat of a file takes {asking * 1e6:.0f} us, reading a module's file {opening * 1e6:.0f} us")
    # not earlier: versions and the device's name take a CUDA context, and a start would find the driver awake
    keep(starts, **environment(), file_stat_us=asking * 1e6, file_read_us=opening * 1e6)
    if given.imports:
        with tempfile.TemporaryDirectory(prefix="s2train_starts_") as scratch:
            plain = Request(given.overrides, 0)
            times = import_times(plain.command(Path(scratch) / "run", Path(scratch) / "caches"))
        console.print(table_of_imports(times))


if __name__ == "__main__":
    main()
