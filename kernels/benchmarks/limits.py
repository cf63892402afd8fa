"""What is not worth beginning: cases that surely do not fit the device's memory, or the time."""

from __future__ import annotations

from .cases import Case
from .contenders import Contender

_USABLE = 0.94  # of the device's memory: its context and the allocator's gaps take the rest


def refusal(
    contender: Contender, case: Case, mask: Case, memory: int | None, ceiling_tflops: float, limit_seconds: float
) -> str | None:
    """Why a contender is not run on a case whose kept positions are `mask`'s; None if it is.

    `memory` is the device's, in bytes. The time is a lower bound: every pass at the device's measured rate of
    matrix products.
    """
    needed = input_bytes(case) + contender.bytes_needed(case)
    if memory is not None and needed > _USABLE * memory:
        return f"needs about {needed / 1e9:.0f} GB, the device has {memory / 1e9:.0f}"
    seconds = contender.passes * pass_flops(mask) / ceiling_tflops / 1e12
    if seconds > limit_seconds:
        return (
            f"its {contender.passes} passes would take {seconds:.0f} s at the rate of matrix products, "
            f"more than --limit-seconds {limit_seconds:g}"
        )
    return None


def pass_flops(mask: Case) -> float:
    """Of forward and backward: 3.5 times 4 * d a kept position."""
    return 3.5 * 4 * mask.dim * mask.kept_positions()


def input_bytes(case: Case) -> int:
    """q, k, v and the output's gradient, bfloat16."""
    return 2 * case.length * case.dim * (2 * case.heads + 2 * case.kv_heads)
