"""Runs the programs in launch/ as a user would, as processes of their own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

# A model small enough that a step takes a tenth of a second: four layers, a dense one first.
SMALL = [
    "+model=tiny_hybrid",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.vocab_size=272",
    "train.seq_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "evaluation.interval=0",
    "tracking.log_interval=1",
    "tracking.wandb=disabled",
    "data.num_workers=0",
    "optim.warmup_steps=2",
]


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it said."""

    status: int
    out: str
    err: str


def run(program: str, *arguments: str, processes: int = 1, cwd: Path = ROOT, timeout: int = 240) -> Outcome:
    """Run launch/`program` under torchrun (or plainly, with 0 processes)."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # The interpreter is for the kernels' own tests; here attention runs on torch.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(ROOT / "launch" / program), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def pretrain(run_dir: Path, *arguments: str, processes: int = 1, cwd: Path = ROOT) -> Outcome:
    """Train the small model in `run_dir`."""
    return run("pretrain.py", *SMALL, f"run_dir={run_dir}", *arguments, processes=processes, cwd=cwd)


def error_line(outcome: Outcome) -> str:
    """The one line by which a program refuses."""
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    return line


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run that tell a step's loss."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "loss" in record]
