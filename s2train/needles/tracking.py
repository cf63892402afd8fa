"""Logs needle results to the wandb run of their training.

A table of cells, scores and heat maps.
"""

from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from s2train.checkpoints.training_run import training_run
from s2train.config import PretrainConfig
from s2train.needles.results import NeedleResults, file_name

COLUMNS = (
    *("task", "length", "depth", "correct", "trials", "score", "low", "high"),
    *("token accuracy", "character accuracy", "contains", "layers from first", "layers from last"),
    *("direct heads", "heads"),
)
Row = tuple[str | int | float | None, ...]


def rows(found: Mapping[str, NeedleResults]) -> list[Row]:
    """Make a row of `COLUMNS` for each requested cell, by task."""
    made: list[Row] = []
    for task, results in found.items():
        for cell in results.asked:
            score, reach = cell.score, cell.reach
            layers = (None,) * 4 if reach is None else astuple(reach)
            contained = None if cell.contained is None else cell.contained.share
            accuracies = cell.token_accuracy, cell.character_accuracy, contained
            counts = cell.correct, cell.trials, score.share, *score.interval
            made.append((task, cell.length, cell.depth, *counts, *accuracies, *layers))
    return made


def log_needles(found: Mapping[str, NeedleResults], trained: PretrainConfig, folder: Path, mode: str) -> str:
    """Log all cells, and each task's heat map, score and effective length.

    Logs at the checkpoint's step. Creates a wandb run if the training had none.

    Args:
        found: results of one checkpoint by task; at least one.
        trained: settings of the run that wrote the checkpoint.
        folder: folder of the heat maps.
        mode: offline or online.
    Returns:
        ID of the wandb run.
    """
    first = next(iter(found.values()))
    run, place = training_run(Path(first.checkpoint), trained, mode)
    run.table("needle/cells", list(COLUMNS), [list(row) for row in rows(found)], place)
    for task, results in found.items():
        run.picture(f"needle/{task}/heat_map", folder / f"{file_name(task)}.png", place)
        score, contained = results.score and results.score.share, results.contained and results.contained.share
        run.log(
            {
                f"needle/{task}/score": score,
                f"needle/{task}/contains": contained,
                f"needle/{task}/effective_length": results.effective_length,
                **place,
            }
        )
    run.close()
    return run.id
