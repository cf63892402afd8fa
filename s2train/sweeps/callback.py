"""Reports a sweep's results at its end, as a Hydra callback."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepReport(Callback):
    """Reports all jobs of a sweep in a table and a picture.

    A sweep with failed jobs exits with status 1.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from s2train.sweeps.report import report  # matplotlib: slow, and no single run needs it

        if not report(Path(config.hydra.sweep.dir)):
            sys.exit(1)
