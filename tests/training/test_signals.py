"""What a run makes of the signals that ask it to end."""

import os
import signal
from collections.abc import Iterator

import pytest

from s2train.errors import STATUS_FILE
from s2train.training.signals import STOP_SIGNALS, StopSignals


@pytest.fixture(autouse=True)
def as_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Handlers as Python sets them, and a job of one."""
    for name in ("RANK", "TORCHELASTIC_RUN_ID", STATUS_FILE):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_remembered(number: signal.Signals) -> None:
    with StopSignals().listening() as signals:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM if number != signal.SIGTERM else signal.SIGUSR1)
        assert signals.received == number
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_says_what_it_does_and_what_a_second_one_would(capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # ends the process
    assert capfd.readouterr().err == "SIGINT: saves after this step and ends; a second Ctrl-C ends at once\n"


def test_of_several_ranks_one_says_it(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("launcher", "ends"),
    [([], False), (["TORCHELASTIC_RUN_ID"], True), (["TORCHELASTIC_RUN_ID", STATUS_FILE], False)],
    ids=["python", "torchrun", "job.py"],
)
def test_a_second_ctrl_c_comes_as_sigterm_from_torchrun_alone(
    launcher: list[str], ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in launcher:
        monkeypatch.setenv(name, "set")
    with StopSignals().listening():
        os.kill(os.getpid(), signal.SIGINT)
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) == ends


def test_ctrl_c_is_not_meant_for_a_shells_background_job() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals().listening() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == 0
