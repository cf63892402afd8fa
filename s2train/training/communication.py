"""How much of a step this rank's GPU communicates, and how much of that nothing else hides."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_T = TypeVar("_T")
Span = tuple[float, float]


@dataclass(frozen=True)
class Communication:
    """Of one step on one rank; None where there is no GPU.

    Attributes:
        step_s: seconds, the profiler's own cost included.
        share: of the step, with a collective at work; waiting for slower ranks counts.
        exposed: of the step, with a collective at work and no other kernel.
    """

    step_s: float
    share: float | None
    exposed: float | None


def measured(step: Callable[[], _T]) -> tuple[_T, Communication]:
    """Run a step under the profiler; its result, and its communication by NCCL's kernels."""
    torch.cuda.synchronize()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        return step(), Communication(time.perf_counter() - begin, None, None)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        begin = time.perf_counter()
        result = step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    collectives: list[Span] = []
    others: list[Span] = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans = collectives if "nccl" in event.name.lower() else others
            spans.append((event.time_range.start * 1e-6, event.time_range.end * 1e-6))
    share, exposed = busy(collectives), busy(collectives + others) - busy(others)
    return result, Communication(seconds, share / seconds, exposed / seconds)


def busy(spans: Iterable[Span]) -> float:
    """Length of the union of (begin, end) spans."""
    total, end = 0.0, -float("inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
