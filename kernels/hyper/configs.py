"""Table of tile sizes, warps and pipeline stages of HyperAttention's kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import torch

from ..configs import Config, padded

Kernel = Literal["sample forward", "bucket forward", "sample dq", "bucket dq", "sample dkdv", "bucket dkdv"]

# 16-bit inputs, by padded head dimension. A program holds `rows` (queries; keys for dk/dv) and iterates over tiles of
# `steps`. Bucket kernels wait for gathered rows with few steps to hide it: small programs, two on a multiprocessor, and
# three stages, since the first only looks up which rows to load.
HALF: dict[Kernel, dict[int, Config]] = {
    "sample forward": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    "bucket forward": {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(64, 32, 8, 2)},
    "sample dq": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "bucket dq": {64: Config(64, 64, 4, 3), 128: Config(64, 32, 4, 3), 256: Config(64, 32, 8, 2)},
    "sample dkdv": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "bucket dkdv": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 2)},
}
# float32: full-precision products run on the CUDA cores, from registers
_SINGLE = {64: Config(32, 32, 8, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 4, 1)}


@cache
def config_for(kernel: Kernel, most: int, dim: int, v_dim: int, dtype: torch.dtype, limit: int | None) -> Config:
    """Return a configuration with at most `most` rows and steps.

    Stages, then tiles are reduced to fit `limit` bytes of shared memory. Raises ValueError if even the smallest does
    not fit.
    """
    width = max(64, padded(dim), padded(v_dim))
    if width > 256:
        raise ValueError(f"head dimensions up to 256 are supported, got {dim} (q, k) and {v_dim} (v)")
    config = _SINGLE[width] if dtype == torch.float32 else HALF[kernel][width]
    config = replace(config, rows=min(config.rows, most), steps=min(config.steps, most))
    while limit is not None and _shared_bytes(kernel, config, dim, v_dim, dtype.itemsize) > limit:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.steps > 16:
            config = replace(config, steps=config.steps // 2)
        elif config.rows > 16:
            config = replace(config, rows=config.rows // 2, num_warps=max(1, config.num_warps // 2))
        else:
            raise ValueError(f"head dimension {dim} does not fit this device's {limit} bytes of shared memory")
    return config


def _shared_bytes(kernel: Kernel, config: Config, dim: int, v_dim: int, itemsize: int) -> int:
    """Return a program's shared memory in bytes.

    It holds resident tiles, and iterated tiles once per stage.
    """
    width = padded(dim) + padded(v_dim)
    resident = padded(dim) if kernel.endswith("forward") else width
    return itemsize * (config.rows * resident + max(config.num_stages, 1) * config.steps * width) + 8192
