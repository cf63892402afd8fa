"""Measures throughput and memory of a run's first steps.

The steps run without evaluation and saving.
"""

import json
from dataclasses import asdict
from typing import Any

from filelock import FileLock

from s2train.command_line.commands import hydra_setting
from s2train.comparison.runs import summarize
from s2train.environment.provenance import environment
from s2train.files import write_json
from s2train.study.files import Folders, naming
from s2train.study.settings import Recipe, train_settings
from s2train.study.values import count, number
from s2train.study.variants import Run, has_warm_up

STEPS = 30


def key(run: Run, gpus: int) -> str:
    """Name of a measurement; it doesn't depend on the seed."""
    return f"{run.variant}-{run.phase}-gpus{gpus}"


def speed_settings(folders: Folders, run: Run, recipe: Recipe, gpus: int) -> list[str]:
    """Return settings of launch/pretrain.py for the first steps of a run.

    The run starts from scratch in any phase, and without a warm-up of scorers: most steps come after it.
    """
    kept = [
        setting
        for setting in train_settings(folders, run, recipe, gpus)
        if not setting.startswith(
            ("run_dir=", "evaluation.", "checkpoint.", "tracking.", "optim.", "train.steps=", "train.freeze")
        )
    ]
    return [
        *kept,
        *(["layout.kinds.E.warm_up_steps=0"] if has_warm_up(run) else []),
        hydra_setting("run_dir", folders.root / "speed" / key(run, gpus)),
        f"optim.lr={recipe.lr}",
        f"train.steps={STEPS}",
        f"optim.warmup_steps={STEPS // 3}",
        "evaluation.interval=0",
        "checkpoint.save=false",
        "tracking.log_interval=5",
        "tracking.wandb=disabled",
    ]


def record(folders: Folders, run: Run, gpus: int) -> dict[str, Any]:
    """Add a measurement to the results, and return it."""
    name = key(run, gpus)
    summary = summarize(folders.root / "speed" / name)
    measured_in = environment()
    row = asdict(summary) | {"name": name, "gpus": gpus, "device": measured_in["device"], "environment": measured_in}
    folders.results.mkdir(parents=True, exist_ok=True)
    with FileLock(folders.root / "speed" / "record.lock"):
        write_json(folders.speed, {"rows": {**read(folders), name: row}})
    return row


def read(folders: Folders) -> dict[str, dict[str, Any]]:
    """Measurements by `key`.

    Raises:
        ConfigError: the file can't be read.
    """
    if not folders.speed.exists():
        return {}
    with naming(folders.speed):
        content = json.loads(folders.speed.read_text())
        # rows of earlier versions don't hold their environment, and the oldest not their device
        shared = content.get("environment", {})
        earlier = {"device": shared.get("device"), "environment": shared}
        rows = {name: earlier | row for name, row in content["rows"].items()}
        for row in rows.values():
            _ = count(row, "gpus", 1), number(row, "tokens_per_s", 0), number(row, "peak_memory_gib"), row["mfu"]
        return rows
