"""The time before the first step is measured by part."""

import ast
import os
import subprocess
import sys
import time

import pytest

from s2train.training.start_times import StartTimes
from tests.program import ROOT


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_parts_are_listed_in_order_and_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    times = StartTimes(98)
    for part in ("imports", "plan", "imports"):
        now[0] += 3
        times.end(part)
    assert list(times.seconds) == ["shell and python", "imports", "plan"]
    assert (times.seconds["imports"], times.seconds["plan"]) == (8, 3)
    assert str(times).startswith(f"{sum(times.seconds.values()):.1f} s (shell and python ")


def test_the_time_before_the_programs_code_is_included() -> None:
    started, clock = _started(os.getpid()), time.CLOCK_BOOTTIME
    before = time.clock_gettime(clock) - started
    seconds = StartTimes().seconds["shell and python"]
    assert before <= seconds <= time.clock_gettime(clock) - started


def test_the_time_of_a_shell_that_became_the_program_is_included_and_named() -> None:
    show = "from s2train.training.start_times import StartTimes; print(*StartTimes().seconds.items())"
    script = f"sleep 0.3; exec '{sys.executable}' -c '{show}'"
    printed = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    part, seconds = ast.literal_eval(printed)
    assert part == "shell and python"
    assert seconds > 0.3


def test_the_launchers_time_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    expected = _started(os.getpid()) - _started(os.getppid())
    times = StartTimes()
    assert list(times.seconds) == ["launcher", "shell and python"]
    assert times.seconds["launcher"] == pytest.approx(expected)


def test_a_restarted_rank_leaves_out_its_launchers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert list(StartTimes().seconds) == ["shell and python"]


def _started(process: int) -> float:
    """Start time of a process, in seconds after boot."""
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
