"""launch/job.py restarts ranks only after failures that a restart may fix."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s2train.errors import EXIT_REQUEUE
from tests.processes import wait_for
from tests.program import ROOT, SMALL, Outcome, error_line, launch

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("job")]

# Counts the attempts; rank 0 ends each as the argument says.
FAILS = """
import os, sys
from s2train.command_line.program import run_command
from s2train.errors import *
if os.environ["RANK"] == "0":
    print("attempt", flush=True)
    print("error file", os.environ["TORCHELASTIC_ERROR_FILE"], flush=True)
    assert "PET_LOG_DIR" not in os.environ, "a job that this rank starts would lose its logs"
def work():
    raise eval(sys.argv[1])
run_command(work)
"""


def job(*command: str, processes: int = 2, **environment: str) -> Outcome:
    options = ["--standalone", "--nproc-per-node", str(processes), "--max-restarts", "1"]
    return launch("job.py", *options, *command, **environment)


@pytest.mark.parametrize(
    ("error", "status", "attempts", "last"),
    [
        ("DivergedError('nan')", 1, 1, "error: nan"),
        ("StartUpError(['torch is another'])", 2, 1, "error: torch is another"),
        ("TrainingError('the disk is full')", 1, 2, "error: the disk is full"),
        ("MissingRankError(['rank 1 did not start'])", 1, 2, "error: rank 1 did not start"),
        ("RuntimeError('NCCL error')", 1, 2, "(local rank 0) exited with status 1: RuntimeError: NCCL error"),
        ("os.kill(os.getpid(), 9)", 1, 2, "(local rank 0) exited with SIGKILL"),
    ],
)
def test_only_failures_that_a_restart_may_fix_are_restarted_and_one_line_gives_the_reason(
    error: str, status: int, attempts: int, last: str, tmp_path: Path
) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    done = job(str(tmp_path / "fails.py"), error, processes=1)
    assert (done.status, done.out.count("attempt\n")) == (status, attempts), done
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert lines, done
    assert lines[-1].endswith(last), done
    assert "ChildFailedError" not in done.err
    for line in done.out.splitlines():
        if line.startswith("error file "):
            assert not Path(line.removeprefix("error file ")).parents[2].exists()  # torchrun's log folder


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        pytest.param("train.steps=-1", "train.steps=-1: must be more than 0", marks=pytest.mark.long),
        ("train.stepz=1", "train.stepz"),  # doesn't compose
        ("data.path=no/such/data", "data.path=no/such/data"),  # rank 0 alone looks
    ],
)
def test_a_setting_that_is_rejected_ends_the_job_with_status_2_and_one_line(
    setting: str, words: str, tmp_path: Path
) -> None:
    done = job("launch/pretrain.py", *SMALL, f"run_dir={tmp_path}", setting)
    assert done.status == 2, done.err
    assert words in error_line(done)
    assert "Traceback" not in done.err


# Sees whether the port is in use before any rank has opened the job's store.
MEETS = """
import os, socket
socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))).close()
"""


def test_no_other_program_can_take_the_port_of_a_job_on_one_node(tmp_path: Path) -> None:
    (tmp_path / "meets.py").write_text(MEETS)
    assert job(str(tmp_path / "meets.py")).status == 0


# Sees whether another program could take the port.
TAKES = """
import errno, os, socket
try:
    socket.socket().bind(("", int(os.environ["MASTER_PORT"])))
except OSError as error:
    assert error.errno == errno.EADDRINUSE
else:
    raise AssertionError("the port was free")
"""


def test_no_other_program_can_take_the_port_of_a_job_on_several_nodes_before_rank_0_does(tmp_path: Path) -> None:
    (tmp_path / "takes.py").write_text(TAKES)
    several = ["--nnodes", "1:2", "--rdzv-conf", "last_call_timeout=1"]
    done = launch("job.py", "--standalone", *several, "--nproc-per-node", "2", str(tmp_path / "takes.py"))
    assert done.status == 0, done.err


def test_a_run_that_diverges_ends_once(tmp_path: Path) -> None:
    settings = [*SMALL, f"run_dir={tmp_path}", "train.steps=6", "train.max_skipped_steps=0"]
    done = job("tests/training/planted.py", *settings, S2TRAIN_TEST_FAULT="nan:1:2")
    assert done.status == 1, done.err
    assert error_line(done).startswith("error: step 2: loss ")
    assert done.out.count("new run in") == 1


# Sends signals to launch/job.py between the starts of two ranks.
INTERRUPTS = """
import os, runpy, signal, sys
from pathlib import Path
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from tests.processes import wait_for
start = SubprocessHandler._popen
def start_and_interrupt(self, arguments, environment):
    rank = start(self, arguments, environment)
    wait_for(Path(sys.argv[-1], "ready" + environment["RANK"]).exists, "the rank to listen")
    if environment["RANK"] == "0":
        for name in os.environ["S2TRAIN_TEST_SIGNALS"].split(","):
            os.kill(os.getpid(), getattr(signal, name))
    return rank
SubprocessHandler._popen = start_and_interrupt
sys.path[0] = "launch"
runpy.run_path("launch/job.py", run_name="__main__")
"""


def interrupted(folder: Path, signals: str) -> Outcome:
    (folder / "interrupts.py").write_text(INTERRUPTS)
    command = ["--standalone", "--nproc-per-node", "2", "tests/launch/saves_when_asked.py", str(folder)]
    environment = {"PET_SHUTDOWN_TIMEOUT": "400", "S2TRAIN_TEST_SIGNALS": signals}
    return launch(str(folder / "interrupts.py"), *command, **environment)


def test_a_signal_that_arrives_while_ranks_start_reaches_all_of_them(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "SIGUSR1")
    assert done.status == EXIT_REQUEUE, done.err
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]


def test_a_second_ctrl_c_while_ranks_start_ends_the_job_at_once(tmp_path: Path) -> None:
    done = interrupted(tmp_path, "SIGINT,SIGINT")
    assert done.status == 128 + signal.SIGINT, done.err
    assert done.err.splitlines()[-1] == "error: SIGINT: the ranks exited without saving"
    assert sorted(path.name for path in tmp_path.glob("ready*")) == ["ready0"]  # no rank was started after it


# Ends a while after a signal, as a long save does: longer than torch before 2.13 lets it.
SAVES = """
import pathlib, signal, sys, time
def save(*_):
    time.sleep(35)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(300)
"""


@pytest.mark.long
def test_a_save_may_take_longer_than_half_a_minute(tmp_path: Path) -> None:
    (tmp_path / "saves.py").write_text(SAVES)
    command = [sys.executable, "launch/job.py", "--standalone", "--nproc-per-node", "1", str(tmp_path / "saves.py")]
    running = subprocess.Popen([*command, str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    wait_for((tmp_path / "started").exists, "the rank to start")
    running.terminate()
    running.wait(120)
    assert (tmp_path / "saved").exists()


# Saves for ever.
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, lambda *_: pathlib.Path(sys.argv[1], "saves").touch())
pathlib.Path(sys.argv[1], "started").touch()
until = time.monotonic() + 400
while time.monotonic() < until:
    time.sleep(0.1)
"""


def test_a_second_ctrl_c_ends_the_ranks_at_once(tmp_path: Path) -> None:
    (tmp_path / "deaf.py").write_text(DEAF)
    command = [sys.executable, "launch/job.py", "--standalone", "--nproc-per-node", "1", str(tmp_path / "deaf.py")]
    with subprocess.Popen(
        [*command, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        wait_for((tmp_path / "started").exists, "the rank to start")
        os.killpg(running.pid, signal.SIGINT)
        wait_for((tmp_path / "saves").exists, "the rank to hear of it")
        os.killpg(running.pid, signal.SIGINT)
        _, err = running.communicate(timeout=300)
    assert running.returncode == 128 + signal.SIGINT
    assert err.splitlines()[-1] == "error: SIGINT: the ranks exited without saving"


def test_without_arguments_it_prints_its_help() -> None:
    done = launch("job.py")
    assert done.status == 2
    assert "python launch/job.py --nproc-per-node 8 launch/pretrain.py" in done.err


@pytest.mark.parametrize(
    ("processes", "expected"),
    [("gpu", "torch sees no GPU"), ("two", "nproc_per_node value: two"), ("0", "=0: not a number of processes")],
)
def test_an_invalid_number_of_processes_is_rejected_in_one_line(processes: str, expected: str) -> None:
    done = launch("job.py", "--nproc-per-node", processes, "launch/pretrain.py", CUDA_VISIBLE_DEVICES="")
    assert done.status == 2
    assert expected in done.err
    assert "Traceback" not in done.err
