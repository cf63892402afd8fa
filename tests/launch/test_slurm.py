"""The batch scripts, with stubs for Slurm and for Python."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.launch.slurm import write_slurm
from tests.processes import wait_for
from tests.program import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")])
# In Python's place: says how it was called, then ends with $STATUS, where $STAYS is set only when a signal comes.
CALLED = """#!/bin/bash
echo "${VIRTUAL:-} $*" >> "$CALLS"
[[ ${STAYS:-} ]] || exit "${STATUS:-0}"
trap 'exit "${STATUS:-0}"' USR1
trap 'exit 15' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job on two nodes; its folder has the repository's launch/ and a `.venv`."""
    write_slurm(tmp_path)
    (tmp_path / "python").write_text(CALLED)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("export VIRTUAL=activated")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(tmp_path), "ASKED": str(tmp_path / "asked"), "CALLS": str(tmp_path / "calls")}
    own = {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return clean | slurm | own


@contextmanager
def at_work(command: list[str], job: dict[str, str], folder: Path, processes: int) -> Iterator["subprocess.Popen[str]"]:
    """A batch script, as soon as it and all that it started listen for SIGUSR1; what is left of it is ended."""
    env = job | {"STAYS": "yes"}
    pipe = subprocess.PIPE
    with subprocess.Popen(["bash", *command], env=env, cwd=folder, stdout=pipe, stderr=pipe, text=True) as batch:
        # a signal that comes before ends a shell
        wait_for(lambda: listeners(batch.pid) >= processes, "listeners")
        family = psutil.Process(batch.pid).children(recursive=True)
        try:
            yield batch
        finally:
            for process in (batch, *family):
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def requests(folder: Path) -> str:
    """What scontrol was asked for."""
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


def listeners(batch: int) -> int:
    """How many of a batch script, its srun and the tasks of that have a handler for SIGUSR1."""
    found = 0
    with suppress(psutil.NoSuchProcess, OSError):  # one has just ended
        script = psutil.Process(batch)
        tasks = [task for started in script.children() for task in started.children()]
        for process in (script, *script.children(), *tasks):
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
            found += caught >> (signal.SIGUSR1 - 1) & 1
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_a_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_batch_job_starts_a_launcher_on_every_node(job: dict[str, str], tmp_path: Path) -> None:
    script = [str(ROOT / "launch/slurm/pretrain.sbatch"), "+model=7b_hybrid", "run_dir=runs/a b"]
    done = subprocess.run(["bash", *script], env=job, cwd="/", capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first == second
    assert first.startswith(f"activated {tmp_path}/launch/job.py --nnodes 2 --nproc-per-node 8 --max-restarts 3 ")
    assert "--rdzv-id 4711 --rdzv-endpoint localhost:24711 " in first
    assert first.endswith("launch/pretrain.py +model=7b_hybrid run_dir=runs/a b")
    assert requests(tmp_path) == ""


@pytest.mark.parametrize(("status", "asked"), [(75, "requeue 4711\n"), (1, "requeue 4711\n"), (138, ""), (0, "")])
def test_a_job_at_its_time_limit_is_requeued_unless_it_is_finished_or_saved_nothing(
    status: int, asked: str, job: dict[str, str], tmp_path: Path
) -> None:
    command = ["launch/slurm/pretrain.sbatch", "+model=7b_hybrid"]
    with at_work(command, job | {"STATUS": str(status)}, tmp_path, processes=4) as batch:
        batch.send_signal(signal.SIGUSR1)
        output, _ = batch.communicate(timeout=400)
    assert batch.returncode == status
    assert requests(tmp_path) == asked
    assert ("requeuing job" in output) == bool(asked)


def test_a_job_that_fails_before_its_time_limit_is_not_requeued(job: dict[str, str], tmp_path: Path) -> None:
    command = ["bash", "launch/slurm/pretrain.sbatch", "+model=7b_hybrid"]
    done = subprocess.run(command, env=job | {"STATUS": "75"}, cwd=tmp_path, timeout=400, check=False)
    assert done.returncode == 75
    assert requests(tmp_path) == ""


def test_a_job_that_slurm_does_not_requeue_reports_it_in_one_line(job: dict[str, str], tmp_path: Path) -> None:
    command = ["launch/slurm/requeue.sh", str(tmp_path / "python")]
    with at_work(command, job | {"STATUS": "75", "REFUSES": "1"}, tmp_path, processes=2) as batch:
        batch.send_signal(signal.SIGUSR1)
        _, errors = batch.communicate(timeout=400)
    assert batch.returncode == 75
    (line,) = errors.splitlines()
    assert line.startswith("error: job 4711 was not requeued")
    assert line.endswith("Submit the same command again to resume")


def test_a_cancelled_job_of_one_node_lets_its_ranks_save(job: dict[str, str], tmp_path: Path) -> None:
    with at_work(["launch/slurm/requeue.sh", str(tmp_path / "python")], job, tmp_path, processes=2) as batch:
        batch.terminate()
        assert batch.wait(400) == 15  # the command's own
    assert requests(tmp_path) == ""


def test_a_cancelled_job_of_several_nodes_sends_srun_no_signal_for_which_it_kills(
    job: dict[str, str], tmp_path: Path
) -> None:
    with at_work(["launch/slurm/run.sh", "program"], job, tmp_path, processes=4) as batch:
        (srun,) = psutil.Process(batch.pid).children()
        batch.terminate()
        batch.wait(400)
        time.sleep(0.5)
        assert srun.is_running()


@pytest.mark.parametrize(("cpus", "option"), [({"SLURM_CPUS_PER_TASK": "64"}, " --cpus-per-task=64"), ({}, "")])
def test_tasks_have_the_environment_and_the_cpus_that_sbatch_was_asked_for(
    cpus: dict[str, str], option: str, job: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", "launch/slurm/run.sh", "program"]
    subprocess.run(command, env=job | cpus, cwd=tmp_path, timeout=400, check=True)
    assert (
        f" --export=ALL{option} {tmp_path}/launch/slurm/../multinode.sh program\n"
        in (tmp_path / "asked.srun").read_text()
    )


@pytest.mark.parametrize(("given", "seconds"), [({}, "240"), ({"SAVE_SECONDS": "800"}, "800")])
def test_ranks_are_ended_before_slurm_ends_the_job_that_is_to_be_queued_again(
    given: dict[str, str], seconds: str, job: dict[str, str]
) -> None:
    command = [str(ROOT / "launch/slurm/requeue.sh"), "printenv", "PET_SHUTDOWN_TIMEOUT"]
    assert subprocess.run(command, env=job | given, capture_output=True, text=True).stdout == f"{seconds}\n"
