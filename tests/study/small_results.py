"""Small results of runs that were never trained."""

import json
from dataclasses import asdict
from typing import Any

from s2train.comparison.runs import Summary
from s2train.study import speed
from s2train.study.files import Folders
from s2train.study.settings import Recipe
from s2train.study.variants import Run


def summary(tokens_per_s: float) -> Summary:
    return Summary("run", 20, 2000, 2.0, 2.5, None, None, 1.0, tokens_per_s, 1.0, 0.25, 10.0)


def result(folders: Folders, run: Run, losses: list[float], step_s: float, gpus: int = 1, **more: Any) -> None:
    content = {
        "run": asdict(run), "gpus": gpus, "density": 0.5, "recipe": asdict(Recipe(1e-3, 100)),
        "summary": asdict(summary(100 * gpus / step_s)),
        "held_out": [[1000 * (i + 1), 10 * (i + 1) * step_s, loss] for i, loss in enumerate(losses)],
        "by_position": [[0, 64, losses[-1] + 1], [64, 128, losses[-1] - 1]], **more,
    }  # fmt: skip
    folders.results.mkdir(exist_ok=True)
    folders.result(run).write_text(json.dumps(content))


def measured(folders: Folders, **tokens_per_s: float) -> None:
    """Write speeds of variants in phase 16k."""
    rows = [
        asdict(summary(value)) | {"gpus": 1, "name": speed.key(Run(variant), 1)}
        for variant, value in tokens_per_s.items()
    ]
    folders.results.mkdir(exist_ok=True)
    folders.speed.write_text(json.dumps({"rows": {row["name"]: row for row in rows}}))


def cells(report: str, variant: str) -> list[str]:
    """The first row of a variant, without spaces around its cells."""
    row = next(line for line in report.splitlines() if line.startswith(f"| {variant} "))
    return [cell.strip() for cell in row.strip("|").split("|")]
