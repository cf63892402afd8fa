"""Settings of the Hopper forward, and which ones a call gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Turns = Literal["none", "issued", "computed"]


@dataclass(frozen=True)
class HopperConfig:
    """Stages in shared memory for queries, keys and values; registers per thread.

    The rest are candidates, off by default and not yet measured: kernels/NOTES.md, "candidates for the forward".

    - ``short_chains``: find a row's maximum by chains of registers that do not wait for each other, and add up a row's
      sum over lanes once a tile, not once a step.
    - ``lazy``: let a row's maximum lag by at most 8 (in base 2), and scale earlier sums only where it changed.
    - ``turns``: the two consumers issue their products in turn, so that the softmax of one runs under the other's. A
      turn ends when both products are issued, or when the first, q k^T, is computed.
    - ``tile_programs``: start a program per tile, for the GPU to place, instead of as many as run at once.
    """

    q_stages: int
    k_stages: int
    v_stages: int
    consumer_registers: int = 240
    producer_registers: int = 24
    short_chains: bool = False
    lazy: bool = False
    turns: Turns = "none"
    tile_programs: bool = False


# Keyed by padded head dimension and keys per chunk; 227 KiB of shared memory hold seven tiles of 128 x 128.
CONFIGS = {
    (64, 64): HopperConfig(2, 4, 4, short_chains=True, lazy=True),
    (64, 128): HopperConfig(2, 4, 4, short_chains=True, lazy=True),
    (128, 64): HopperConfig(2, 3, 2, short_chains=True, lazy=True),
    (128, 128): HopperConfig(2, 2, 3, short_chains=True, lazy=True),
}
