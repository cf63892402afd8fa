"""Multiply the rows of a matrix by factors, in place."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .fp_fusion import with_fp_fusion

_BLOCK = 4096


@with_fp_fusion
@triton.jit
def _scale_rows_kernel(x, factors, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        at, inside = x + row * width + columns, columns < width
        tl.store(at, tl.load(at, mask=inside).to(tl.float32) * factor, mask=inside)


def scale_rows(x: Tensor, factors: Tensor) -> None:
    """Multiply each row by its factor, in place.

    x is [n, w], contiguous, factors are fp32 [n]. Products are fp32, rounded once. torch's `mul_` takes 4.4 ms for
    32,768 rows of 32,768 bfloat16 on an H200, where the bytes take one.
    """
    assert x.is_contiguous()
    _scale_rows_kernel[(len(x),)](x, factors.contiguous(), x.shape[1], BLOCK=_BLOCK)
