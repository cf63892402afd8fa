import io
import re
import time

import pytest

from s2train.preparation.progress import Meter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list whose only entry is the current time."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_shows_share_documents_speed_and_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    meter = Meter("tokenizing", 400, out=out)
    clock[0] += 50
    meter.update(100, 1234, 25_000_000)
    assert out.getvalue() == "tokenizing: 25%, 1,234 documents, 0.5 MB/s, 0:02:30 left\n"


def test_earlier_progress_does_not_count_for_the_time_left(clock: list[float]) -> None:
    out = io.StringIO()
    meter = Meter("tokenizing", 400, before=300, out=out)
    clock[0] += 50
    meter.update(350, 1, 0)
    assert "88%" in out.getvalue()
    assert "0:00:50 left" in out.getvalue()


def test_a_log_gets_a_line_each_half_minute_and_a_terminal_a_rewritten_one(clock: list[float]) -> None:
    log, terminal = io.StringIO(), Terminal()
    meters = [Meter("writing", 100, out=out) for out in (log, terminal)]
    for step in range(100):
        clock[0] += 1
        for meter in meters:
            meter.update(step, step, step)
    for meter in meters:
        meter.close()
    assert len(log.getvalue().splitlines()) == 3
    assert terminal.getvalue().count("\n") == 1
    assert len(re.findall(r"\rwriting", terminal.getvalue())) == 100
