"""Needle results in the wandb run of the training that they are of."""

from pathlib import Path

from s2train.config import PretrainConfig
from s2train.evaluation.results import NeedleResults
from s2train.megatron.checkpoint import read_progress
from s2train.wandb_run import RunInfo, WandbRun


def log_needles(results: NeedleResults, trained: PretrainConfig, heat_map: Path, mode: str) -> str:
    """Heat map, table and score, at the checkpoint's step; returns the id of the run they went to.

    Args:
        trained: settings of the run that wrote the checkpoint; a run that had no wandb run gets one here.
        heat_map: PNG.
        mode: offline or online.
    """
    checkpoint, tracking = Path(results.checkpoint), trained.tracking
    run = WandbRun(
        RunInfo(
            mode=mode,
            project=tracking.project,
            group=tracking.group,
            name=Path(trained.run_dir).name,
            id=read_progress(checkpoint).wandb_id,
            folder=checkpoint.resolve().parents[1],
            config={},
        )
    )
    columns = ["length", "depth", "correct", "trials", "token accuracy"]
    rows = [[c.length, c.depth, c.correct, c.trials, c.token_accuracy] for c in results.asked]
    run.picture("needles", heat_map, results.step)
    run.table("needle cells", columns, rows, results.step)
    run.log({"needle_score": results.score, "step": results.step})
    run.close()
    return run.id
