"""Sum over the first dimension, rounding once.

torch's sum reaches a third of an H200's memory bandwidth on so few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp_fusion import with_fp_fusion
from .launch import Launcher

_ELEMENTS = 2048  # of a program: 16 bytes of a part for each of 256 threads in bfloat16


@with_fp_fusion
@triton.jit
def _leading_sum_kernel(parts, out, size, COUNT: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, mask=inside, other=0).to(TYPE)
    for _ in tl.static_range(COUNT - 1):
        parts += size
        total += tl.load(parts + at, mask=inside, other=0).to(TYPE)
    tl.store(out + at, total, mask=inside)


_launch = Launcher(_leading_sum_kernel)


def leading_sum(parts: Tensor, out: Tensor) -> None:
    """Write the sum over the first dimension, accumulated in float32.

    float64 is summed in float64. `parts` is contiguous, [p, ...]; `out` too, with one part's elements.
    """
    size = out.numel()
    accumulator = tl.float64 if parts.dtype == torch.float64 else tl.float32
    _launch(
        (triton.cdiv(size, _ELEMENTS), 1, 1),
        (parts, out, size, len(parts), _ELEMENTS, accumulator),
        num_warps=8,
    )
