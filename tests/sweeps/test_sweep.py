"""Sweeps run as a user starts them: `python launch/pretrain.py -m …`."""

import csv
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from omegaconf import OmegaConf

from s2train.data.blend import BUNDLED_PREFIX
from tests.forked import forking_python
from tests.processes import is_alive, wait_for
from tests.program import ROOT, SMALL, Outcome, error_line, metrics, run

pytestmark = pytest.mark.xdist_group("sweeps")
QUICK = [*SMALL, "train.steps=3"]
# A sweep whose jobs wait for a signal before their sixth step.
WAITING = """
import os, runpy, sys
with open({process!r}, "w") as file:
    file.write(str(os.getpid()))
os.environ["S2TRAIN_TEST_FAULT"] = "waits:0:6"
sys.argv[0], sys.path[0] = {job!r}, os.path.dirname({program!r})
runpy.run_path({program!r}, run_name="__main__")
"""


def sweep(folder: Path, *arguments: str) -> Outcome:
    return run("pretrain.py", "-m", *QUICK, f"hydra.sweep.dir={folder}", *arguments, processes=0)


@pytest.mark.slow
def test_a_failing_job_stops_no_other_and_the_same_sweep_again_runs_only_that(tmp_path: Path) -> None:
    data = tmp_path / "later"
    arguments = [f"data.path={data},bundled", "hydra.launcher.n_jobs=2"]
    first = sweep(tmp_path / "mine", *arguments)
    assert first.status == 1
    rows = list(csv.DictReader((tmp_path / "mine" / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert f"{data}.idx is missing" in rows[0]["error"]
    assert f"{data}.idx is missing" in first.out
    assert (tmp_path / "mine" / "sweep.png").is_file()
    assert OmegaConf.load(tmp_path / "mine" / rows[1]["folder"] / "config.yaml").tracking.group == "mine"

    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(ROOT / f"{BUNDLED_PREFIX}{suffix}", f"{data}{suffix}")
    untouched = tmp_path / "mine" / rows[1]["folder"] / "metrics.jsonl"
    before = untouched.stat().st_mtime_ns
    second = sweep(tmp_path / "mine", *arguments).succeeded()
    assert "2 jobs, 1 already finished, 1 to run" in second.out
    assert untouched.stat().st_mtime_ns == before
    again = list(csv.DictReader((tmp_path / "mine" / "sweep.csv").open()))
    assert [row["status"] for row in again] == ["finished"] * 2
    assert again[0]["loss"] == again[1]["loss"]  # the same data at another path


@pytest.mark.slow
def test_an_interrupted_sweep_stops_its_ranks_and_resumes_from_their_checkpoint(tmp_path: Path) -> None:
    folder, pretrain = tmp_path / "mine", str(ROOT / "launch" / "pretrain.py")
    settings = [*SMALL, "train.steps=20", "checkpoint.interval=4", "seed=5", f"hydra.sweep.dir={folder}"]
    own = {"job": str(ROOT / "tests" / "training" / "planted.py"), "process": str(tmp_path / "process")}
    (tmp_path / "program.py").write_text(WAITING.format(program=pretrain, **own))
    command = [str(forking_python(tmp_path)), str(tmp_path / "program.py"), "-m", *settings]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def has_saved() -> bool:
        assert process.poll() is None, process.communicate()
        return any(folder.glob("*/checkpoints/iter_*"))

    wait_for(has_saved, "a checkpoint")
    family = psutil.Process(int((tmp_path / "process").read_text())).children(recursive=True)
    assert len(family) > 1  # a launcher and its rank
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=400)
    assert process.returncode == 130
    assert b"the same command resumes" in printed
    assert not any(is_alive(member.pid) for member in family)

    run("pretrain.py", "-m", *settings, processes=0).succeeded()
    (first,) = folder.glob("job-*")
    assert '"event": "resume"' in (first / "metrics.jsonl").read_text()
    assert metrics(first)[-1]["step"] == 20


@pytest.mark.slow
def test_a_sweep_inside_torchrun_is_rejected_with_the_right_command(tmp_path: Path) -> None:
    outcome = run("pretrain.py", "-m", *QUICK, "seed=1,2", f"hydra.sweep.dir={tmp_path / 'mine'}", processes=2)
    assert "python launch/pretrain.py -m" in error_line(outcome)
    assert not (tmp_path / "mine").exists()


def test_jobs_in_one_process_are_rejected(tmp_path: Path) -> None:
    line = error_line(sweep(tmp_path, "hydra/launcher=basic", "seed=1,2"))
    assert "s2train_local" in line


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_queued_slurm_job_is_not_submitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    fake(tools, "sbatch", f'echo "$@" >> {calls}; echo "4$(wc -l < {calls});cluster"')
    fake(tools, "squeue", '[[ "$*" == *41* ]] && echo PENDING')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for expected in (2, 3):  # job 41 stays in the queue, job 42 is gone
        outcome = sweep(tmp_path / "mine", "hydra/launcher=s2train_slurm", "seed=1,2").succeeded()
        assert len(calls.read_text().splitlines()) == expected
    assert all("job.sbatch" in line for line in calls.read_text().splitlines())
    assert outcome.out.count("│ submitted │") == 2


def test_slurm_scripts_are_written_without_slurm_and_submitted_only_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    arguments = ["hydra/launcher=s2train_slurm", "seed=1,2", "+hydra.launcher.options.partition=gpu"]
    assert "hydra.launcher.submit=false" in error_line(sweep(tmp_path / "mine", *arguments))
    assert sweep(tmp_path / "mine", *arguments, "hydra.launcher.submit=false").status == 0
    scripts = list((tmp_path / "mine").glob("*/job.sbatch"))
    assert len(scripts) == 2
    assert all("#SBATCH --partition=gpu\n" in script.read_text() for script in scripts)


def test_a_slurm_job_whose_ranks_overlap_across_nodes_is_rejected(tmp_path: Path) -> None:
    launcher = ("hydra/launcher=s2train_slurm", "hydra.launcher.submit=false", "hydra.launcher.nodes=2")
    overlap = ("parallel.tp=2", "parallel.sequence_parallel=true", "parallel.tp_comm_overlap=true,false")
    outcome = sweep(tmp_path / "mine", *launcher, *overlap)
    assert outcome.status == 2
    assert "machines of 1 GPU don't hold whole groups of parallel.tp=2" in outcome.err


@pytest.mark.slow
def test_a_sweeper_that_waits_for_slurm_gets_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, python = tmp_path / "bin", forking_python(tmp_path)
    fake(tools, "sbatch", f'sed "s#{sys.executable}#{python}#" "${{@: -1}}" | bash > /dev/null 2>&1; echo 41')
    fake(tools, "squeue", "exit 1")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    sweep(tmp_path / "mine", "hydra/launcher=s2train_slurm", "hydra.launcher.wait=true", "seed=1").succeeded()
    (row,) = csv.DictReader((tmp_path / "mine" / "sweep.csv").open())
    assert row["status"] == "finished"
    assert float(row["loss"]) > 0


@pytest.mark.slow
def test_the_guides_search_runs_as_printed_and_prints_the_best_parameters(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `sweep`")
    (printed,) = [line for line in (ROOT / "docs/training.md").read_text().splitlines() if "sweeper=optuna" in line]
    words = shlex.split(printed, comments=True)
    search = words[words.index("+model=tiny_hybrid") + 1 :]
    short = ["hydra.sweeper.n_trials=4", "+hydra.sweeper.sampler.seed=1", "hydra.launcher.n_jobs=2"]
    outcome = sweep(tmp_path / "mine", *search, *short).succeeded()
    rows = list(csv.DictReader((tmp_path / "mine" / "sweep.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 4
    best = min(rows, key=lambda row: float(row["held_out_loss"] or row["loss"]))
    assert f"best of 4: optim.lr={best['optim.lr']} | loss {float(best['loss']):.4f} | " in outcome.out


@pytest.mark.parametrize(("models", "folder"), [("tiny_hybrid", "tiny_hybrid"), ("tiny_hybrid,tiny_dense", "models")])
def test_a_sweep_s_folder_is_named_after_its_model_unless_it_has_several(
    tmp_path: Path, models: str, folder: str
) -> None:
    content: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "pretrain.yaml"), resolve=False)
    default = content["hydra"]["sweep"]["dir"]
    assert default.startswith("runs/sweeps/")
    moved = default.replace("runs", str(tmp_path), 1)
    settings = [f"+model={models}", "seed=1,2", "plan=true", f"hydra.sweep.dir={moved}"]
    run("pretrain.py", "-m", *settings, processes=0).succeeded()
    assert (tmp_path / "sweeps" / folder / "sweep.csv").is_file()
