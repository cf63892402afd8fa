"""Names and lists the checkpoints in a run folder.

It reads no checkpoint, and imports nothing slow.
"""

from pathlib import Path


def folder_name(step: int) -> str:
    """Megatron's folder name for the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Step in a checkpoint's folder name."""
    return int(checkpoint.name[5:])


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name would be a checkpoint."""
    return name.startswith("iter_") and name[5:].isdigit()


def checkpoints_in(root: Path) -> list[Path]:
    """List the checkpoints in a `checkpoints` folder, damaged or not, oldest first.

    The list is empty if the folder does not exist.
    """
    found = [path for path in root.glob("iter_*") if is_checkpoint_name(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def own_checkpoints(run_dir: str | Path) -> Path:
    """Folder in which a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def checkpoints_of(run_dir: str | Path) -> list[Path]:
    """List a run's checkpoints, as `checkpoints_in`."""
    return checkpoints_in(own_checkpoints(run_dir))


def checkpoint_at(run_dir: str | Path, step: int) -> Path:
    """Folder of a run's checkpoint after `step` steps, there or not."""
    return own_checkpoints(run_dir) / folder_name(step)


def is_own(checkpoint: Path, run_dir: str | Path) -> bool:
    """Whether a checkpoint is in a run's own folder."""
    return checkpoint.parent.resolve() == own_checkpoints(run_dir).resolve()
