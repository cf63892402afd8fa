"""Several nodes: two torchrun agents on this machine, as launch/multinode.sh starts them."""

import os
import secrets
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from s2train.distributed.ports import hold_port, port_of
from s2train.errors import EXIT_REQUEUE
from tests.forked import forking_python
from tests.launch.slurm import write_slurm
from tests.processes import wait_for
from tests.program import ROOT, SMALL, metrics

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nodes")]

SAVES_WHEN_ASKED = "tests/launch/saves_when_asked.py"


@pytest.fixture
def port() -> Iterator[int]:
    """A port that no other program takes, of those that launch/slurm/run.sh makes of a job's number."""
    held = None
    while held is None:
        with suppress(OSError):
            held = hold_port(20_000 + secrets.randbelow(12_000))
    with held:
        yield port_of(held)


def environment(folder: Path, port: int, **settings: object) -> dict[str, str]:
    own = {
        "PYTHON": str(forking_python(folder)),
        "OMP_NUM_THREADS": "1",
        "LOG_DIR": str(folder / "logs"),
        "NPROC_PER_NODE": "1",
    }
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONUNBUFFERED")}
    job = {"HEAD": f"localhost:{port}", "JOB_ID": folder.name, "NNODES": "2"}
    return clean | job | own | {name: str(value) for name, value in settings.items()}


def kill(node: subprocess.Popen[bytes]) -> None:
    """All processes of a node at once, as when it loses power."""
    whole = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in whole:
        with suppress(psutil.NoSuchProcess):  # it has just ended by itself
            process.kill()
    node.wait()


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command, its output going to a file; whatever still runs at the end is ended."""
    started: list[subprocess.Popen[bytes]] = []

    def start_one(command: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            started.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT))
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            kill(process)


def test_a_node_that_dies_and_rejoins_resumes_from_the_last_checkpoint(
    start: Callable[..., subprocess.Popen[bytes]], port: int, tmp_path: Path
) -> None:
    env = environment(tmp_path, port, S2TRAIN_TEST_FAULT="waits:0:6")
    folder = tmp_path / "run"
    run_dir = f"run_dir={folder}"
    settings = ["train.steps=20", "checkpoint.interval=4", "checkpoint.keep=2"]
    command = ["launch/multinode.sh", "tests/training/planted.py", *SMALL, *settings]

    def port_is_open() -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("localhost", port)) == 0

    first = start([*command, run_dir], tmp_path / "first.txt", env)
    wait_for(port_is_open, "the first node, which keeps the rendezvous")
    second = start([*command, run_dir], tmp_path / "second.txt", env)
    wait_for(lambda: bool(list(folder.glob("checkpoints/iter_*"))), "a checkpoint")
    kill(second)
    (folder / "go").touch()

    second = start([*command, run_dir], tmp_path / "second.txt", env)
    wait_for(lambda: first.poll() is not None and second.poll() is not None, "the end")
    assert (first.returncode, second.returncode) == (0, 0), (tmp_path / "first.txt").read_text()[-3000:]
    assert metrics(folder)[-1]["step"] == 20
    outputs = [path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")]
    assert any("resuming from" in text for text in outputs)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_slurm_job_whose_time_is_up_saves_and_is_queued_again(
    start: Callable[..., subprocess.Popen[bytes]], port: int, tmp_path: Path, nodes: int
) -> None:
    write_slurm(tmp_path)
    asked = tmp_path / "asked"
    number = port - 20_000
    slurm = {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": nodes, "ASKED": asked}
    env = environment(tmp_path, port, **slurm, MAX_RESTARTS=3, PATH=f"{tmp_path}:{os.environ['PATH']}")
    one_node = [
        "launch/slurm/requeue.sh",
        str(tmp_path / "python"),
        "launch/job.py",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    starts = one_node if nodes == 1 else ["launch/slurm/run.sh"]
    command = [*starts, SAVES_WHEN_ASKED, str(tmp_path)]

    job = start(command, tmp_path / "job.txt", env)
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 2, "the ranks")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(200) == EXIT_REQUEUE
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]
    assert asked.read_text() == f"requeue {number}\n"

    asked.unlink()
    assert start(command, tmp_path / "job.txt", env).wait(200) == 0
    assert not asked.exists()


def test_what_a_rank_writes_is_in_the_log_at_once(
    start: Callable[..., subprocess.Popen[bytes]], port: int, tmp_path: Path
) -> None:
    (tmp_path / "speaks.py").write_text("import time\nprint('spoken')\ntime.sleep(300)\n")
    log = tmp_path / "log.txt"
    job = start(["launch/multinode.sh", str(tmp_path / "speaks.py")], log, environment(tmp_path, port, NNODES=1))
    wait_for(lambda: "[rank0]: spoken\n" in log.read_text(), "the rank's words")
    assert job.poll() is None


def test_if_one_node_rejects_the_run_all_nodes_exit_with_its_status(
    start: Callable[..., subprocess.Popen[bytes]], port: int, tmp_path: Path
) -> None:
    env = environment(tmp_path, port, MAX_RESTARTS=3)
    command = ["launch/multinode.sh", "launch/pretrain.py", *SMALL, f"run_dir={tmp_path / 'run'}"]
    nodes = [
        start([*command, more], tmp_path / f"{more}.txt", env)
        for more in ("train.steps=6", "train.global_batch_size=3")
    ]
    wait_for(lambda: all(node.poll() is not None for node in nodes), "the end")
    assert [node.returncode for node in nodes] == [2, 2]
    found = [line for path in tmp_path.glob("*.txt") for line in path.read_text().splitlines() if "error: " in line]
    assert len(found) == 1
    assert "train.global_batch_size=3" in found[0]
