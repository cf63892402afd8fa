"""Draws the picture of a run's layout while the run trains."""

import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO

from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import lacking
from s2train.config import PretrainConfig
from s2train.errors import ConfigError, first_line
from s2train.training.metrics import Tracker
from s2train.training.picture_worker import PICTURE, STOPPED, draw
from s2train.training.signals import STOP_SIGNALS
from s2train.training.worker_process import start_worker, worker_command

_WORKER = "s2train.training.picture_worker"
# Statuses of a process that was ended: by the run, or by a signal that a scheduler sent to all processes of the run.
_STOPPED = (STOPPED, *(-number for number in STOP_SIGNALS))


class LayoutPicture:
    """Draws a run's layout in a process, and shows it in wandb.

    A thread would hold Python's lock for half a second, mostly in imports, and the steps would wait. Start it after the
    first step, whose start needs the cores. As a context, it ends with the picture: a process that has not drawn it by
    then is ended, and the picture drawn here, where matplotlib is needed for the losses anyway. An error that ends the
    run ends the process too. A picture that can't be drawn is logged, and stops no run.

    Args:
        active: whether this rank draws.

    Attributes:
        path: the picture's file; None until it is drawn, and if there is none, since data choose what a layer reads.
    """

    def __init__(self, cfg: PretrainConfig, hybrid: HybridLayout, tracker: Tracker, *, active: bool) -> None:
        self._cfg, self._tracker = cfg, tracker
        self._active = active and not lacking(hybrid.layers, Feature.PICTURES)
        self._is_due = False  # not drawn, and not found impossible to draw
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: Thread | None = None
        self.path: Path | None = None

    def start(self) -> None:
        """Start to draw."""
        if not self._active:
            return
        self._is_due = True
        try:
            errors = tempfile.TemporaryFile()  # noqa: SIM115 (`_wait` reads it)
            self._process = start_process(self._cfg, errors)
        except OSError as error:  # too many processes, no place for temporary files
            self._tracker.note(f"the layout's picture is drawn at the end: no process draws it meanwhile ({error})")
        if self._process is not None:
            self._waiting = Thread(target=self._wait, args=(self._process, errors), name="layout picture", daemon=True)
            self._waiting.start()

    def _wait(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        """Show what the process drew, or log why it didn't."""
        status = process.wait()
        if status == 0:
            self._show(Path(self._cfg.run_dir) / PICTURE)
        elif status not in _STOPPED:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            self._log_problem(lines[-1].strip() if lines else f"its process ended with status {status}")

    def _show(self, path: Path) -> None:
        self._is_due, self.path = False, path
        self._tracker.picture("layout/picture", path)

    def _log_problem(self, problem: str) -> None:
        self._is_due = False
        self._tracker.note(f"the layout's picture can't be drawn: {problem}; continuing")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process; draw the picture if it has not."""
        if self._process is not None and self._waiting is not None:
            self._process.terminate()
            self._waiting.join()
        if not self._is_due or error is not None:
            return
        try:
            self._show(draw(self._cfg))
        except Exception as found:  # a broken matplotlib, a full disk: the run needs no picture
            self._log_problem(first_line(found))


def start_process(cfg: PretrainConfig, errors: IO[bytes]) -> "subprocess.Popen[bytes] | None":
    """Start a process that draws; it writes its errors to a file.

    None: no process is to draw, and the picture is drawn at the end.
    """
    return start_worker(worker_command(_WORKER), cfg, subprocess.DEVNULL, errors)


def check_matplotlib() -> None:
    """Check that a run's pictures can be drawn, without importing matplotlib.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        problem = "the pictures of a run's layout and losses need it"
        raise ConfigError("matplotlib", "(not installed)", problem, "Install it: pip install matplotlib")
