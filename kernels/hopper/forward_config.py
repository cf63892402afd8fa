"""Settings of the Hopper forward, and which ones a call gets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HopperConfig:
    """Stages in shared memory for queries, keys and values; registers per thread."""

    q_stages: int
    k_stages: int
    v_stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


# Keyed by padded head dimension and keys per chunk; 227 KiB of shared memory hold seven tiles of 128 x 128.
CONFIGS = {
    (64, 64): HopperConfig(2, 4, 4),
    (64, 128): HopperConfig(2, 4, 4),
    (128, 64): HopperConfig(2, 3, 2),
    (128, 128): HopperConfig(2, 2, 3),
}
