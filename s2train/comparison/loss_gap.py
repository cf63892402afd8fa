"""Compares losses of runs with a base run's, by step."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from s2train.errors import ConfigError
from s2train.training.records import read_records


@dataclass(frozen=True)
class Gap:
    """Loss of a run minus the base run's, nats per token.

    Of reports over the same steps: a report's loss is the mean since the one before.

    Attributes:
        steps: reports in common; one for each step where tracking.log_interval is 1.
        first: gap of the first report.
        mean_size, largest: mean and maximum of its absolute value over all reports.
        last: signed mean over the last tenth of the reports.
    """

    name: str
    steps: int
    first: float
    mean_size: float
    largest: float
    last: float


def gaps(base: Path, runs: Sequence[Path]) -> list[Gap]:
    """Compare runs that reported every step.

    Raises:
        ConfigError: a run has no metrics, or no report over the same steps as one of the base run.
    """
    expected = _losses(base)
    found = []
    for run in runs:
        losses = _losses(run)
        differences = [losses[steps] - expected[steps] for steps in sorted(losses.keys() & expected.keys())]
        if not differences:
            problem = f"has no report over the same steps as one of {base}"
            raise ConfigError("runs", run, problem, "Set tracking.log_interval=1")
        tail = differences[-max(len(differences) // 10, 1) :]
        sizes = [abs(difference) for difference in differences]
        found.append(
            Gap(run.name, len(sizes), differences[0], statistics.mean(sizes), max(sizes), statistics.mean(tail))
        )
    return found


def table(base: Path, found: Sequence[Gap]) -> Table:
    """Make a table with one line per run."""
    shown = Table(
        f"loss minus {base.name}'s", "steps", "first", "mean |gap|", "largest", "last tenth", box=box.SIMPLE_HEAD
    )
    for gap in found:
        numbers = (f"{gap.first:+.5f}", f"{gap.mean_size:.5f}", f"{gap.largest:.5f}", f"{gap.last:+.5f}")
        shown.add_row(gap.name, str(gap.steps), *numbers)
    return shown


def _losses(run: Path) -> dict[tuple[int, int], float]:
    """Read losses by the steps of the report before and their own."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError("runs", run, "has no metrics.jsonl", "Set folders of runs")
    reports = [record for record in read_records(path) if "event" not in record and "loss" in record]
    steps = [0, *(report["step"] for report in reports)]
    return {
        (before, report["step"]): report["loss"]
        for before, report in zip(steps, reports, strict=False)
        if report["loss"] is not None
    }
