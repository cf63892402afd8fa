"""Jobs run as concurrent processes and are stopped with all their descendants."""

import os
import signal
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from s2train.sweeps.processes import Command, run_all

# A child in a separate session, like torchrun's ranks; `deaf` ones ignore SIGTERM.
PARENT = """
import signal, subprocess, sys, time
deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" if sys.argv[1] == "deaf" else ""
child = subprocess.Popen([sys.executable, "-c", deaf + "print('ready', flush=True); import time; time.sleep(60)"],
                         start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
signal.signal(signal.SIGTERM, lambda *_: (child.terminate(), sys.exit(3)))
print(child.pid, flush=True)
time.sleep(60)
"""


def command(folder: Path, code: str, *arguments: str) -> Command:
    return Command([sys.executable, "-c", code, *arguments], folder / "job" / "log.txt", folder)


def nothing(index: int) -> None:
    pass


def test_each_job_has_its_log_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    commands = [
        command(tmp_path / str(n), f"import os; print(os.getcwd(), {n}); raise SystemExit({n})") for n in range(4)
    ]
    for n in range(4):
        (tmp_path / str(n)).mkdir()
    started: list[int] = []
    ended = dict(run_all(commands, [dict(os.environ)] * 2, started.append, grace_s=5))
    assert ended == {0: 0, 1: 1, 2: 2, 3: 3}
    assert started == [0, 1, 2, 3]
    assert (tmp_path / "3" / "job" / "log.txt").read_text() == f"{tmp_path / '3'} 3\n"


def test_no_two_concurrent_jobs_share_an_environment(tmp_path: Path) -> None:
    code = """
import os, pathlib, time
slot = pathlib.Path(os.environ["SLOT"])
slot.mkdir()  # fails if taken
time.sleep(0.2)
slot.rmdir()
"""
    commands = [Command([sys.executable, "-c", code], tmp_path / f"{n}.txt", tmp_path) for n in range(6)]
    environments = [dict(os.environ) | {"SLOT": name} for name in "ab"]
    assert {status for _, status in run_all(commands, environments, nothing, grace_s=5)} == {0}


def test_an_older_log_is_renamed(tmp_path: Path) -> None:
    for word in ("first", "second"):
        list(run_all([command(tmp_path, f"print('{word}')")], [dict(os.environ)], nothing, grace_s=5))
    assert (tmp_path / "job" / "log.txt").read_text() == "second\n"
    assert (tmp_path / "job" / "log.1.txt").read_text() == "first\n"


@pytest.mark.parametrize("hearing", ["obedient", "deaf"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_a_job_and_all_its_descendants(tmp_path: Path, sent: signal.Signals, hearing: str) -> None:
    job = command(tmp_path, PARENT, hearing)
    before = signal.getsignal(signal.SIGTERM)
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT

    def interrupt() -> None:
        while not job.log.is_file() or not job.log.read_text().strip():
            time.sleep(0.05)
        os.kill(os.getpid(), sent)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt), closing(run_all([job], [dict(os.environ)], nothing, grace_s=1)) as ended:
        list(ended)
    thread.join()
    signal.signal(signal.SIGINT, given)
    with suppress(psutil.NoSuchProcess):  # without an init process, a killed process stays a zombie
        assert psutil.Process(int(job.log.read_text())).status() == psutil.STATUS_ZOMBIE
    assert signal.getsignal(signal.SIGTERM) is before
