"""A rank's device, and what watches its process while it runs."""

from dataclasses import dataclass

import torch

from s2train.training.signals import StopSignals
from s2train.training.start_times import StartTimes
from s2train.training.watchdog import Watchdog


@dataclass(frozen=True)
class RankProcess:
    """A rank's device, and what watches its process.

    Attributes:
        signals: ask the run to save and exit.
        watchdog: aborts the job if the rank makes no progress.
        times: of the start, which ends with the first step.
    """

    device: torch.device
    signals: StopSignals
    watchdog: Watchdog
    times: StartTimes
