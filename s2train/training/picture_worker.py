"""Draws a run's layout in a process; `s2train.training.layout_picture` starts it."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from s2train.config import PretrainConfig
from s2train.distributed.parent_death_signal import signal_on_parent_death
from s2train.training.worker_process import read_task

PICTURE = "layout.png"  # in the run folder
STOPPED = 128 + signal.SIGTERM  # status of a process that SIGTERM ended
_NICENESS = 10  # the run's steps come first


def main() -> None:
    """Draw what standard input says."""
    signal_on_parent_death(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop)  # leaves no unfinished picture
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run
    os.nice(_NICENESS)
    cfg: PretrainConfig | None = read_task()
    if cfg is not None:
        draw(cfg)


def draw(cfg: PretrainConfig) -> Path:
    """Draw the layout to the run folder, and return the picture's path."""
    from s2train import pictures  # matplotlib: slow
    from s2train.planning import hybrid_layout

    path = Path(cfg.run_dir) / PICTURE
    pictures.draw_layout(hybrid_layout(cfg), cfg.train.seq_length, path, title=cfg.model.name)
    return path


def _stop(number: int, frame: FrameType | None) -> None:
    sys.exit(STOPPED)


if __name__ == "__main__":
    main()
