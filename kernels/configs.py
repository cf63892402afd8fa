"""Table of tile sizes, warps and pipeline stages of the kernels.

The table replaces autotuning: every rank uses the same configuration, so that runs are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import triton

Kernel = Literal["forward", "dq", "dkdv"]
HOPPER_MULTIPROCESSORS = 132  # of an H100 or H200


@dataclass(frozen=True)
class Config:
    """Launch configuration of one kernel.

    A program holds `rows` (queries; keys for dk/dv) and iterates over tiles of `steps`.
    """

    rows: int
    steps: int
    num_warps: int
    num_stages: int


# Keyed by kernel, then by (tile limit, padded head dimension); the tile limit is the block size, at most 128.
# 16-bit inputs: on Hopper, 64 rows for each group of 4 warps keep the products on wgmma.
_HALF: dict[Kernel, dict[tuple[int, int], Config]] = {
    "forward": {
        (128, 64): Config(128, 128, 8, 3),
        (128, 128): Config(128, 128, 8, 2),
        (128, 256): Config(128, 64, 8, 2),
        (64, 64): Config(64, 64, 4, 3),
        (64, 128): Config(64, 64, 4, 3),
        (64, 256): Config(64, 64, 8, 2),
        (32, 64): Config(32, 32, 2, 3),
        (32, 128): Config(32, 32, 2, 3),
        (32, 256): Config(32, 32, 4, 2),
        (16, 64): Config(16, 16, 1, 3),
        (16, 128): Config(16, 16, 1, 3),
        (16, 256): Config(16, 16, 2, 2),
    },
    "dq": {
        (128, 64): Config(128, 64, 8, 3),
        (128, 128): Config(128, 64, 8, 3),
        (128, 256): Config(64, 32, 4, 2),
        (64, 64): Config(64, 64, 4, 3),
        (64, 128): Config(64, 64, 4, 2),
        (64, 256): Config(64, 32, 4, 2),
        (32, 64): Config(32, 32, 2, 2),
        (32, 128): Config(32, 32, 4, 2),
        (32, 256): Config(32, 32, 4, 1),
        (16, 64): Config(16, 16, 1, 2),
        (16, 128): Config(16, 16, 1, 2),
        (16, 256): Config(16, 16, 2, 2),
    },
    "dkdv": {
        (128, 64): Config(128, 64, 8, 2),
        (128, 128): Config(128, 64, 8, 2),
        (128, 256): Config(64, 32, 8, 2),
        (64, 64): Config(64, 64, 4, 2),
        (64, 128): Config(64, 32, 4, 2),
        (64, 256): Config(64, 32, 8, 2),
        (32, 64): Config(32, 32, 2, 2),
        (32, 128): Config(32, 32, 4, 2),
        (32, 256): Config(32, 32, 4, 1),
        (16, 64): Config(16, 16, 1, 2),
        (16, 128): Config(16, 16, 1, 2),
        (16, 256): Config(16, 16, 2, 2),
    },
}
# float32 inputs: full-precision products run on the CUDA cores, from registers.
_SINGLE: dict[tuple[int, int], Config] = {
    (32, 64): Config(32, 32, 8, 1),
    (32, 128): Config(32, 32, 8, 1),
    (32, 256): Config(16, 16, 4, 1),
    (16, 64): Config(16, 16, 4, 1),
    (16, 128): Config(16, 16, 4, 1),
    (16, 256): Config(16, 16, 4, 1),
}


def padded(dim: int) -> int:
    """Return the padded head dimension: a power of two, at least 16.

    Matrix products need at least 16.
    """
    return max(16, 1 << (dim - 1).bit_length())


def shared_bytes(kernel: str, config: Config, dim: int, v_dim: int, itemsize: int, more: int = 4096) -> int:
    """Return a program's shared memory in bytes.

    Counts resident tiles, iterated tiles once per stage, and `more`.
    """
    width = padded(dim) + padded(v_dim)
    resident = padded(dim) if kernel.endswith("forward") else width
    return itemsize * (config.rows * resident + max(config.num_stages, 1) * config.steps * width) + more


def fitted(
    config: Config, limit: int | None, needed: Callable[[Config], int], dim: int, fewest_rows: int = 16
) -> Config:
    """Reduce a configuration to at most `limit` bytes of shared memory.

    First the stages are reduced, then the tiles are halved. Raises ValueError if even the smallest does not fit.
    """
    while limit is not None and needed(config) > limit:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.steps > 16:
            config = replace(config, steps=config.steps // 2)
        elif config.rows > fewest_rows:
            config = replace(config, rows=config.rows // 2, num_warps=max(1, config.num_warps // 2))
        else:
            raise ValueError(f"head dimension {dim} does not fit this device's {limit} bytes of shared memory")
    return config


def shared_limit(device: torch.device) -> int | None:
    """Return bytes of shared memory per program on `device`.

    Return None (no limit) in the interpreter.
    """
    if device.type != "cuda":
        return None
    return _shared_limit(torch.cuda.current_device() if device.index is None else device.index)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has.

    Where there is no GPU, return those of an H100, for which schedules are then made.
    """
    if device.type != "cuda":
        return HOPPER_MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@cache
def _shared_limit(index: int) -> int:
    # Queried once: the query also reads clock rates, which takes up to a millisecond in the driver, and ten times that
    # when eight processes query at once (triton-lang/triton issue 3724).
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


@cache
def config_for(kernel: Kernel, block_size: int, dim: int, v_dim: int, dtype: torch.dtype, limit: int | None) -> Config:
    """Return the table's configuration, reduced to fit `limit` bytes of shared memory.

    Raises ValueError as `fitted`, and for head dimensions above 256.
    """
    width = max(64, padded(dim), padded(v_dim))
    # the minimum for a tensor core product; full-precision float32 uses no tensor cores and can have fewer rows
    fewest_rows = 8 if dtype == torch.float32 else 16
    if width > 256:
        raise ValueError(f"head dimensions up to 256 are supported, got {dim} (q, k) and {v_dim} (v)")
    if dtype == torch.float32:
        config = _SINGLE[min(block_size, 32), width]
    else:
        config = _HALF[kernel][min(block_size, 128), width]
    return fitted(config, limit, lambda one: shared_bytes(kernel, one, dim, v_dim, dtype.itemsize), dim, fewest_rows)
