"""Chooses the learning rate on the dense model by short runs.

The batch is fixed: short runs favour small batches, as they take more steps.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from filelock import FileLock

from s2train.command_line.commands import hydra_settings
from s2train.comparison.claims import claim
from s2train.data.indexed import read_metadata
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.study.files import Folders, naming
from s2train.study.settings import Recipe, data_settings, micro_batch, sequences_of
from s2train.study.values import count, number
from s2train.study.variants import PHASES, SEEDS, attention_settings
from s2train.training.records import read_curves

GRID = tuple(Recipe(lr, 1 << 17) for lr in (1.5e-4, 3e-4, 6e-4, 1.2e-3))
TOKENS = 16_000_000  # of each run
PHASE = "16k"  # whose length and model the runs have


@dataclass(frozen=True)
class Trial:
    """One run of the sweep."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return f"lr{self.recipe.lr:g}-batch{self.recipe.batch_tokens}"

    @property
    def steps(self) -> int:
        return -(-TOKENS // self.recipe.batch_tokens)

    def settings(self, folders: Folders, gpus: int = 1) -> list[str]:
        """Settings of launch/pretrain.py; the held-out loss is measured at the end."""
        phase = PHASES[PHASE]
        sequences = sequences_of(phase, self.recipe)
        settings = {
            "run_dir": folders.root / "sweep" / self.name,
            **data_settings(folders, phase),
            "seed": SEEDS[0],
            "train.seq_length": phase.length,
            "train.global_batch_size": sequences,
            "train.micro_batch_size": micro_batch(phase.length, sequences, gpus),
            "train.steps": self.steps,
            "optim.lr": self.recipe.lr,
            "optim.warmup_steps": max(1, self.steps // 10),
            "evaluation.interval": self.steps,
            "evaluation.batches": max(1, phase.held_out_tokens // self.recipe.batch_tokens),
            "checkpoint.interval": self.steps,
            "checkpoint.keep": 1,
            "tracking.log_interval": 5,
            "tracking.wandb": "disabled",
        }
        return [*phase.model, "model.name=dense", *attention_settings("dense", phase), *hydra_settings(settings)]


@contextmanager
def claimed(folders: Folders, trial: Trial) -> Iterator[bool]:
    """Claim a trial, and yield whether to run it.

    A trial is not run if it is finished, or another process runs it.
    """
    with claim(folders.root / "sweep" / f"{trial.name}.lock") as is_free:
        yield is_free and trial.name not in finished(folders)


def running(folders: Folders) -> list[str]:
    """Trials that other processes run."""
    names = []
    for trial in map(Trial, GRID):
        with claimed(folders, trial) as is_due:
            if not is_due and trial.name not in finished(folders):
                names.append(trial.name)
    return names


def record(folders: Folders, trial: Trial) -> None:
    """Add a finished trial's held-out loss to the results."""
    losses = read_curves(folders.root / "sweep" / trial.name / "metrics.jsonl").held_out
    data = read_metadata(str(folders.train_data))
    folders.results.mkdir(parents=True, exist_ok=True)
    with FileLock(folders.root / "sweep" / "record.lock"):
        rows = [row for row in read(folders) if row["name"] != trial.name]
        rows.append({"name": trial.name, **asdict(trial.recipe), "held_out_loss": losses.get(trial.steps)})
        content = {
            "tokens": TOKENS,
            "data_tokens": data and data.tokens,
            "trials": sorted(rows, key=lambda row: (row["batch_tokens"], row["lr"])),
            "environment": environment(),
        }
        write_json(folders.sweep, content)


def finished(folders: Folders) -> set[str]:
    """Return the names of trials that have a result."""
    return {row["name"] for row in read(folders)}


def read(folders: Folders) -> list[dict[str, Any]]:
    """Read the results of finished trials.

    Raises:
        ConfigError: the file can't be read.
    """
    if not folders.sweep.exists():
        return []
    with naming(folders.sweep):
        trials: list[dict[str, Any]] = json.loads(folders.sweep.read_text())["trials"]
        for row in trials:
            _ = row["name"], number(row, "lr", 0), count(row, "batch_tokens", 1)
            _ = row["held_out_loss"] is None or number(row, "held_out_loss")
    return trials


def chosen(folders: Folders) -> Recipe:
    """The recipe with the lowest held-out loss.

    Raises:
        ConfigError: trials are missing, or all losses are.
    """
    rows = read(folders)
    missing = [trial.name for trial in map(Trial, GRID) if trial.name not in finished(folders)]
    finite = [row for row in rows if row["held_out_loss"] is not None]
    if missing or not finite:
        problem = f"{folders.sweep} lacks {len(missing) or len(rows)} of {len(GRID)} trials"
        remedy = f"Run {folders.command('sweep')}, or set --lr and --batch-tokens"
        raise ConfigError("root", folders.root, problem, remedy)
    best = min(finite, key=lambda row: float(row["held_out_loss"]))
    return Recipe(best["lr"], best["batch_tokens"])
