"""Opens the wandb run of the training that wrote a checkpoint."""

from dataclasses import replace
from pathlib import Path

from s2train.checkpoints.folders import read_progress
from s2train.config import PretrainConfig
from s2train.wandb_run import RunInfo, WandbRun, place_of


def training_run(checkpoint: Path, trained: PretrainConfig, mode: str) -> tuple[WandbRun, dict[str, int]]:
    """Open the training's run, or create one if it had none.

    Args:
        trained: settings of the run that wrote the checkpoint.
        mode: offline or online.
    Returns:
        the run, and the checkpoint's place on its axes.
    """
    progress = read_progress(checkpoint)
    run = WandbRun(
        RunInfo(
            mode=mode,
            id=progress.wandb_id,
            folder=checkpoint.resolve().parents[1],
            config={},
            # the name that the training used, even if its folder was moved
            tracking=replace(trained.tracking, name=trained.tracking.name or Path(trained.run_dir).name),
        )
    )
    return run, place_of(progress.step, progress.consumed_samples * trained.train.seq_length)
