"""Needle results in wandb: a row for each cell of each task, the scores, the heat maps."""

from collections.abc import Mapping
from pathlib import Path

from s2train.config import NeedleConfig
from s2train.evaluation.results import NeedleResults, file_name

COLUMNS = (
    *("task", "length", "depth", "correct", "trials", "score", "low", "high"),
    *("token accuracy", "character accuracy", "layers from first", "layers from last"),
)
Row = tuple[str | int | float | None, ...]


def rows(found: Mapping[str, NeedleResults]) -> list[Row]:
    """A row of `COLUMNS` for each cell asked for, by task."""
    made: list[Row] = []
    for task, results in found.items():
        for cell in results.asked:
            score, reach = cell.score, cell.reach
            layers = (None, None) if reach is None else (reach.from_first, reach.from_last)
            accuracies = cell.token_accuracy, cell.character_accuracy
            counts = cell.correct, cell.trials, score.share, *score.interval
            made.append((task, cell.length, cell.depth, *counts, *accuracies, *layers))
    return made


def log_results(cfg: NeedleConfig, folder: Path, found: Mapping[str, NeedleResults]) -> None:
    """A wandb run of its own, named after the checkpoint's run; call it on one rank."""
    import wandb  # slow, and not everybody has it where the GPUs are

    first = next(iter(found.values()))
    run = wandb.init(
        project=cfg.project,
        job_type="needle",
        name=f"needle {first.checkpoint}",
        mode=cfg.wandb,  # type: ignore[arg-type]
        dir=str(folder),
        config={"checkpoint": first.checkpoint, "step": first.step}
        | {task: results.settings for task, results in found.items()},
    )
    run.log({"needles": wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows(found)])})
    for task, results in found.items():
        run.log({f"{task} heat map": wandb.Image(str(folder / f"{file_name(task)}.png"))})
        run.summary[f"{task} score"] = results.score and results.score.share
        run.summary[f"{task} effective length"] = results.effective_length
    run.finish()
