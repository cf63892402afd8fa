"""Table of tile sizes, warps and pipeline stages of HyperAttention's kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

import torch

from ..configs import Config, fitted, padded, shared_bytes

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

    It is reduced to fit `limit` bytes of shared memory. Raises ValueError as `fitted`, and for head dimensions above
    256.
    """
    width = max(64, padded(dim), padded(v_dim))
    if width > 256:
        raise ValueError(f"head dimensions up to 256 are supported, got {dim} (q, k) and {v_dim} (v)")
    config = _SINGLE[width] if dtype == torch.float32 else HALF[kernel][width]
    config = replace(config, rows=min(config.rows, most), steps=min(config.steps, most))
    return fitted(config, limit, lambda one: shared_bytes(kernel, one, dim, v_dim, dtype.itemsize, more=8192), dim)
