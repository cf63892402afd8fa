"""Starts are measured up to their first step."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from s2train.comparison import starts
from s2train.comparison.import_times import PackageTime, by_package
from s2train.comparison.starts import Request, Start, measure, measure_all, table
from s2train.errors import TrainingError
from tests.program import SMALL

REPORT = """\
import time: self [us] | cumulative | imported package
import time:       200 |        200 |   numpy._core
import time:       300 |        500 | numpy
a warning of the program
import time:       900 |       1400 | torch
"""


def test_imports_are_summed_by_package() -> None:
    assert by_package(REPORT) == [PackageTime("torch", 1, 0.0009), PackageTime("numpy", 2, 0.0005)]


def test_the_table_has_a_column_per_start_and_medians_of_repeated_kinds() -> None:
    starts = [Start("cold 1", 9.0, {"imports": 5.0, "kernels": 4.0}, 10, 3)]
    starts += [Start(f"warm {n}", n + 1.0, {"imports": float(n)}, 10, 0) for n in (1, 2, 6)]
    console = Console(width=120, file=io.StringIO())
    console.print(table(starts))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["seconds", "cold", "1", "warm", "1", "warm", "2", "warm", "6", "warm", "median"] in lines
    assert ["imports", "5.00", "1.00", "2.00", "6.00", "2.00"] in lines
    assert ["kernels", "4.00", "0.00", "0.00", "0.00", "0.00"] in lines
    assert ["launch", "to", "step", "1", "9.00", "2.00", "3.00", "7.00", "3.00"] in lines
    assert ["without", "byte", "code", "3", "0", "0", "0", "0"] in lines


@pytest.mark.slow
def test_a_start_is_measured_in_total_and_by_parts(tmp_path: Path) -> None:
    request = Request([*SMALL, "train.steps=4"], 0)
    start = measure(request, "cold 1", tmp_path / "run", tmp_path / "caches")
    assert list(start.seconds)[:3] == ["shell and python", "imports", "compose"]
    assert list(start.seconds)[-1] == "first step"
    assert start.modules > start.without_byte_code >= 0
    assert start.modules > 1000
    assert start.total_s == pytest.approx(sum(start.seconds.values()), abs=0.5)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(record.get("step", 0) for record in records) == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_the_error_of_a_failed_run_is_reported(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cold 1: the run ended with status 2: error: layout=nothing"):
        measure(Request([*SMALL, "layout=nothing"], 0), "cold 1", tmp_path / "run", tmp_path / "caches")


def test_starts_are_kept_as_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_third(request: Request, name: str, folder: Path, caches: Path) -> Start:
        if name == "warm 2":
            raise TrainingError("it failed")
        return Start(name, 1.0, {}, 10, 0)

    monkeypatch.setattr(starts, "measure", fail_third)
    kept: list[list[str]] = []
    with pytest.raises(TrainingError):
        measure_all(Request([], 0), 1, 2, 1, lambda found: kept.append([start.name for start in found]))
    assert kept == [["cold 1"], ["cold 1", "warm 1"]]
