"""Times attention on every rank.

The number of passes is fixed, so that collectives match.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from s2train.kernels.benchmarks.timing import Clock

_WARM = 2


def time_attention(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], dout: Tensor, clock: Clock, passes: int
) -> dict[str, float]:
    """Measure median ms of forward and backward on this rank.

    The backward computes the gradients of `inputs`.
    """
    spans: list[tuple[object, object, object]] = []
    for _ in range(_WARM + passes):
        clock.start()
        before = clock.mark()
        out = forward()
        between = clock.mark()
        torch.autograd.grad(out, inputs, dout)
        spans.append((before, between, clock.mark()))
    clock.wait()
    timed = spans[_WARM:]
    return {
        "forward": median(clock.milliseconds(begin, middle) for begin, middle, _ in timed),
        "backward": median(clock.milliseconds(middle, end) for _, middle, end in timed),
    }


def time_call(call: Callable[[], object], clock: Clock, passes: int) -> float:
    """Measure median ms of a call without gradients."""
    spans = []
    with torch.no_grad():
        for _ in range(_WARM + passes):
            clock.start()
            before = clock.mark()
            call()
            spans.append((before, clock.mark()))
    clock.wait()
    return median(clock.milliseconds(*span) for span in spans[_WARM:])
