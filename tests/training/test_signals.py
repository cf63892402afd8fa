"""A run handles the signals that ask it to save and exit."""

import os
import signal
from collections.abc import Iterator

import pytest

from s2train.errors import STATUS_FILE
from s2train.training.signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's default handlers and a job of one process."""
    for name in ("RANK", "TORCHELASTIC_RUN_ID", STATUS_FILE):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_stored(number: signal.Signals) -> None:
    with StopSignals().listening() as signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM if number != signal.SIGTERM else signal.SIGUSR1)
        assert signals.received == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_prints_what_it_does_and_what_a_second_one_does(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # ends the process
    assert (
        capfd.readouterr().err
        == "SIGINT: saving after this or the next step, then exiting; press Ctrl-C again to exit now\n"
    )


def test_only_rank_0_prints_it(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("launcher", "ends"),
    [([], False), (["TORCHELASTIC_RUN_ID"], True), (["TORCHELASTIC_RUN_ID", STATUS_FILE], False)],
    ids=["python", "torchrun", "job.py"],
)
def test_a_second_ctrl_c_arrives_as_sigterm_from_plain_torchrun_only(
    launcher: list[str], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launcher:
        monkeypatch.setenv(name, "set")
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == ends


def test_a_shells_background_job_ignores_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals().listening() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == 0
