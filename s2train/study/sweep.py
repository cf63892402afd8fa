"""Chooses learning rate and batch on the dense model by short runs."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.study.files import Folders
from s2train.study.settings import HELD_OUT_TOKENS, Recipe, data_settings, micro_batch
from s2train.study.variants import MODEL, PHASES, SEEDS, attention_settings
from s2train.training.records import read_curves

GRID = tuple(Recipe(lr, batch) for batch in (1 << 17, 1 << 18) for lr in (6e-4, 1.2e-3, 2.4e-3))
TOKENS = 16_000_000  # of each run


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
        phase = PHASES["16k"]
        sequences = max(1, self.recipe.batch_tokens // phase.length)
        return [
            *MODEL,
            "model.name=dense",
            *attention_settings("dense", phase),
            f"run_dir={folders.root / 'sweep' / self.name}",
            *data_settings(folders),
            f"seed={SEEDS[0]}",
            f"train.seq_length={phase.length}",
            f"train.global_batch_size={sequences}",
            f"train.micro_batch_size={micro_batch(phase.length, sequences, gpus)}",
            f"train.steps={self.steps}",
            f"optim.lr={self.recipe.lr}",
            f"optim.warmup_steps={max(1, self.steps // 10)}",
            f"evaluation.interval={self.steps}",
            f"evaluation.batches={max(1, HELD_OUT_TOKENS // self.recipe.batch_tokens)}",
            f"checkpoint.interval={self.steps}",
            "checkpoint.keep=1",
            "tracking.log_interval=5",
            "tracking.wandb=disabled",
        ]


def record(folders: Folders, trial: Trial) -> None:
    """Add a finished trial's held-out loss to the results."""
    losses = read_curves(folders.root / "sweep" / trial.name / "metrics.jsonl").held_out
    rows = [row for row in read(folders) if row["name"] != trial.name]
    rows.append({"name": trial.name, **asdict(trial.recipe), "held_out_loss": losses.get(trial.steps)})
    content = {"tokens": TOKENS, "trials": rows, "environment": environment()}
    with replacing(folders.sweep) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def read(folders: Folders) -> list[dict[str, Any]]:
    """Finished trials."""
    if not folders.sweep.is_file():
        return []
    trials: list[dict[str, Any]] = json.loads(folders.sweep.read_text())["trials"]
    return trials


def chosen(folders: Folders) -> Recipe:
    """The recipe with the lowest held-out loss.

    Raises:
        ConfigError: trials are missing, or all losses are.
    """
    rows = read(folders)
    missing = [trial.name for trial in map(Trial, GRID) if trial.name not in {row["name"] for row in rows}]
    finite = [row for row in rows if row["held_out_loss"] is not None]
    if missing or not finite:
        problem = f"{folders.sweep} lacks {len(missing) or len(rows)} of {len(GRID)} trials"
        remedy = f"Run python launch/quality_study.py sweep --root {folders.root}, or set --lr and --batch-tokens"
        raise ConfigError("root", folders.root, problem, remedy)
    best = min(finite, key=lambda row: float(row["held_out_loss"]))
    return Recipe(best["lr"], best["batch_tokens"])
