"""Settings of the Hopper backward."""

from __future__ import annotations

from dataclasses import dataclass

from .backward_schedule import DEFAULTS, ScheduleOptions


@dataclass(frozen=True)
class HopperBackwardConfig:
    """Stages for tiles of queries and output gradients; registers per thread.

    - ``schedule``: choices that only static layouts have, and no packed documents. 128 queries a step take head
      dimension 64 and blocks of at least 128.
    """

    stages: int
    consumer_registers: int = 240
    other_registers: int = 24
    schedule: ScheduleOptions = DEFAULTS


# Keyed by head dimension; three stages of 128 take 226 KiB of shared memory in all.
CONFIGS = {128: HopperBackwardConfig(3), 64: HopperBackwardConfig(4)}
