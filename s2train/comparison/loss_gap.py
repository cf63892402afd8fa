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

    At the same steps.

    Attributes:
        first: gap at the first step that both report.
        mean_size, largest: mean and maximum of its absolute value over all common steps.
        last: signed mean over the last tenth of the steps.
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
        ConfigError: a run has no metrics, or shares no step with the base run.
    """
    expected = _losses(base)
    found = []
    for run in runs:
        losses = _losses(run)
        differences = [losses[step] - expected[step] for step in sorted(losses.keys() & expected.keys())]
        if not differences:
            raise ConfigError("runs", run, f"has no reported step in common with {base}", "Set tracking.log_interval=1")
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


def _losses(run: Path) -> dict[int, float]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError("runs", run, "has no metrics.jsonl", "Set folders of runs")
    return {record["step"]: record["loss"] for record in read_records(path) if record.get("loss") is not None}
