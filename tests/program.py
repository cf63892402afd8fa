"""Runs the programs in launch/ as a user would, in separate processes."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from s2train.distributed.torchrun_logs import without_log_folders
from tests.forked import PICTURES, Job, run_job

ROOT = Path(__file__).parents[1]

# A model small enough that a step takes a twentieth of a second: four layers, a dense one first.
SMALL = [
    "+model=tiny_hybrid",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.vocab_size=272",
    "train.seq_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "evaluation.interval=0",
    "tracking.log_interval=1",
    "tracking.wandb=disabled",
    "data.num_workers=0",
    "optim.warmup_steps=2",
]


# For a run whose checkpoint no test reads: saving takes a third of a short run's time.
UNSAVED = "checkpoint.save=false"

# A folder's name with characters that mean something to Hydra, a shell or a wildcard.
AWKWARD_NAME = "my runs, (v2)=é '[\"*]' ${x}"


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it said."""

    status: int
    out: str
    err: str

    def succeeded(self) -> "Outcome":
        """Fail the test with what the program said if it failed."""
        assert self.status == 0, self.err[-3000:]
        return self


def run(
    program: str,
    *arguments: str,
    processes: int = 1,
    cwd: Path = ROOT,
    timeout: int = 240,
    by_torchrun: bool = False,
    interpret: bool = False,
    pictures: bool = False,
) -> Outcome:
    """Run launch/`program`, or a module, on ranks that know of each other (or plainly, with 0 processes).

    Args:
        by_torchrun: as a user does, and slower; else, on a CPU, by `tests.forked`.
        interpret: on a CPU, with Triton's kernels interpreted; else attention runs on torch there.
        pictures: draw them; else, on a CPU, each is blank.
    """
    path = str(ROOT / "launch" / program) if program.endswith(".py") else program
    # Unbuffered, a line and its end would be two writes, and other ranks' lines come in between.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONUNBUFFERED")}
    if interpret:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if pictures:
        environment[PICTURES] = "1"
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
    }
    if not by_torchrun and not torch.cuda.is_available():  # a process that has looked for GPUs can't be forked
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            job = Job(path, arguments, processes, str(cwd), environment, str(out), str(err), timeout)
            return Outcome(run_job(job), out.read_text(), err.read_text())
    with without_log_folders() as logs:
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", *logs, "--standalone", "--nproc-per-node", str(processes)]
        if not program.endswith(".py"):
            launcher.append("-m")
        done = subprocess.run(
            [*launcher, path, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    return Outcome(done.returncode, done.stdout, done.stderr)


# A program that is signalled: `[*PRELOADED, program, …]` is the program itself, and what it starts are forks.
PRELOADED = [sys.executable, "-m", "tests.forked"]


def launch(launcher: str, *arguments: str, **environment: str) -> Outcome:
    """Run launch/`launcher`, or a module, that starts ranks itself."""
    with mock.patch.dict(os.environ, environment):
        return run(launcher, *arguments, processes=0, timeout=1800)


def results_of(module: str, *arguments: str, processes: int = 0, interpret: bool = False) -> Any:
    """JSON in the last line that a test module prints as a program."""
    done = run(module, *arguments, processes=processes, interpret=interpret).succeeded()
    return json.loads(done.out.splitlines()[-1])


def reported(module: str, case: Sequence[Any]) -> Any:
    """Results of a test module for a case; Triton compiles there and does not interpret."""
    return results_of(module, json.dumps(case))


def pretrain(run_dir: Path, *arguments: str, processes: int = 1, cwd: Path = ROOT, pictures: bool = False) -> Outcome:
    """Train the small model in `run_dir`."""
    words = [*SMALL, f"run_dir={run_dir}", *arguments]
    return run("pretrain.py", *words, processes=processes, cwd=cwd, pictures=pictures)


def error_line(outcome: Outcome) -> str:
    """The one line by which a program rejects."""
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return line


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run that hold a step's loss."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]
