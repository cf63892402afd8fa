"""A rank that saves and stops at SIGUSR1, as a training run does: `saves_when_asked.py FOLDER`.

It ends at once if an earlier job saved in FOLDER.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from s2train.command_line.program import run_command
from s2train.errors import StoppedBySignal

folder, rank = Path(sys.argv[1]), os.environ["RANK"]


def save(*_: object) -> NoReturn:
    (folder / f"saved{rank}").touch()
    raise StoppedBySignal("SIGUSR1", 1, folder)


def work() -> None:
    signal.signal(signal.SIGUSR1, save)
    (folder / f"ready{rank}").touch()
    time.sleep(300)


if __name__ == "__main__" and not (folder / "saved0").exists():
    run_command(work)
