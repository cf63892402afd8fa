"""The batch scripts, with stubs for Slurm and for Python."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.launch.slurm import write_slurm
from tests.program import ROOT

SCRIPTS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch")])
# In Python's place: says how it was called, then waits for a signal, as a run that saves nothing.
CALLED = """#!/bin/bash
echo "${VIRTUAL:-} $*" >> "$CALLS"
[[ ${STAYS:-} ]] || exit 0
trap 'exit 138' USR1
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
    done = subprocess.run(["bash", *script], env=job, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first == second
    assert first.startswith(f"activated {tmp_path}/launch/job.py --nnodes 2 --nproc-per-node 8 --max-restarts 3 ")
    assert "--rdzv-id 4711 --rdzv-endpoint localhost:24711 " in first
    assert first.endswith("launch/pretrain.py +model=7b_hybrid run_dir=runs/a b")
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("setting", "asked"), [("checkpoint.save=false", ""), ("seed=1", "requeue 4711\n")])
def test_a_job_that_saves_nothing_is_not_queued_again(
    setting: str, asked: str, job: dict[str, str], tmp_path: Path
) -> None:
    command = ["bash", "launch/slurm/pretrain.sbatch", "+model=7b_hybrid", setting]
    with subprocess.Popen(command, env=job | {"STAYS": "yes"}, cwd=tmp_path, stdout=subprocess.DEVNULL) as batch:
        until = time.monotonic() + 60
        while listeners(batch.pid) < 4:  # a signal that comes before ends a shell
            assert time.monotonic() < until
            time.sleep(0.05)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(60) == 138
    assert ((tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else "") == asked
