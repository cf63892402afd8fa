"""What Hydra does when a sweep has ended."""

import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class AtTheEnd(Callback):
    """Table and picture of all jobs, whichever sweeper proposed them; a sweep with failed jobs ends with status 1."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from s2train.sweeps.report import report  # matplotlib: slow, and no single run needs it

        if not report(Path(config.hydra.sweep.dir)):
            sys.exit(1)
