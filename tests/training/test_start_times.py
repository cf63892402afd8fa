"""Where the time before the first step goes."""

import os
import time

import pytest

from s2train.training.start_times import StartTimes


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


def test_parts_follow_each_other_and_may_come_in_pieces() -> None:
    times = StartTimes(time.monotonic() - 2)
    for part in ("imports", "plan", "imports"):
        time.sleep(0.02)
        times.end(part)
    assert list(times.seconds) == ["python", "imports", "plan"]
    assert times.seconds["imports"] >= 2.04
    assert times.seconds["plan"] < 1
    assert str(times).startswith(f"{sum(times.seconds.values()):.1f} s (python ")


def test_what_the_process_did_before_is_told_too() -> None:
    lived = time.clock_gettime(time.CLOCK_BOOTTIME) - _started(os.getpid())
    assert StartTimes().seconds["python"] == pytest.approx(lived, abs=0.5)


def test_a_launchers_own_time_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    expected = _started(os.getpid()) - _started(os.getppid())
    times = StartTimes()
    assert list(times.seconds) == ["launcher", "python"]
    assert times.seconds["launcher"] == pytest.approx(expected, abs=0.05)


def test_a_rank_that_was_started_again_leaves_its_launchers_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert list(StartTimes().seconds) == ["python"]


def _started(process: int) -> float:
    """Seconds after the machine's start."""
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
