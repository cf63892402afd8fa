"""Skip cases that exceed the device's memory or the time limit."""

from __future__ import annotations

from .cases import Case
from .contenders import Contender

_USABLE = 0.94  # of the device's memory: its context and gaps in the allocator take the rest


def skip_reason(
    contender: Contender, case: Case, mask: Case, memory: int | None, ceiling_tflops: float, limit_seconds: float
) -> str | None:
    """Return why a contender is not run on a case, or None.

    `mask` is the case whose positions it keeps. `memory` is the device's, in bytes. The time is a lower bound: all
    passes at the device's measured rate of matrix products.
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
    """Return FLOPs of forward and backward: 14 * d per kept position.

    The forward takes 4 * d, the backward 2.5 times as much.
    """
    return 3.5 * 4 * mask.dim * mask.kept_positions()


def input_bytes(case: Case) -> int:
    """Return bytes of q, k, v and the output's gradient in bfloat16."""
    return 2 * case.length * case.dim * (2 * case.heads + 2 * case.kv_heads)
