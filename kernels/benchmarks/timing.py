"""Measure times on the device and on the host.

Device times are measured with the host ahead of the device, as in a training step: a short sleep is queued first, so
that they exclude launches. `launch_costs` measures the cost of launches separately.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, TypeVar

import torch

_FLUSH_BYTES = 256 * 2**20  # more than any cache
_HEAD_START = 4_000_000  # clock cycles, over 2 ms
_CEILING_SIZE = 8192
_CALLS = 40  # that a cost is measured over
T = TypeVar("T")


class Clock:
    """Mark times in the order of the device's work.

    On a CPU it is the order of the host's work.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self.on_gpu else 0, dtype=torch.int8, device=device)

    def start(self) -> None:
        """Empty the caches, and let the host get ahead."""
        if self.on_gpu:
            self._flush.zero_()
            torch.cuda._sleep(_HEAD_START)

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


def time_passes(
    forward: Callable[[], T], backward: Callable[[T], object], clock: Clock, budget_ms: float
) -> dict[str, Any]:
    """Return median ms of forward, backward and both in a row.

    Runs 3 to 30 passes, for about `budget_ms`. `spread` is the range of both over its median. Call it warm.
    """

    def one() -> tuple[Any, ...]:
        clock.start()
        before = clock.mark()
        out = forward()
        between = clock.mark()
        backward(out)
        return before, between, clock.mark()

    marks = [one()]
    clock.wait()
    first = clock.milliseconds(marks[0][0], marks[0][2])
    marks += [one() for _ in range(min(29, max(2, round(budget_ms / max(first, 1e-3)))))]
    clock.wait()
    spans = {"forward": (0, 1), "backward": (1, 2), "both": (0, 2)}
    times = {name: [clock.milliseconds(m[a], m[b]) for m in marks] for name, (a, b) in spans.items()}
    both = times["both"]
    return {
        "ms": {name: median(values) for name, values in times.items()},
        "passes": len(marks),
        "spread": (max(both) - min(both)) / median(both),
    }


def matmul_ceiling(clock: Clock, device: torch.device) -> float:
    """Measure TFLOP/s of a large bfloat16 product.

    Takes the median of 20 products of random 8192 x 8192 matrices.
    """
    n = _CEILING_SIZE if clock.on_gpu else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    spans = []
    for _ in range(20):
        clock.start()
        before = clock.mark()
        a @ b
        spans.append((before, clock.mark()))
    clock.wait()
    return 2 * n**3 / median(clock.milliseconds(*span) for span in spans) / 1e9


def launch_costs(call: Callable[[], object], clock: Clock) -> dict[str, Any]:
    """Measure a call's cost beyond the device's work; call it warm.

    host_us: host time of one call while the device is busy. eager_ms: a single call, from an idle device to its end.
    device_ms: with the host ahead. graph_ms: replayed from a CUDA graph; None (with the reason) if capture fails.
    """
    clock.wait()
    if clock.on_gpu:
        torch.cuda._sleep(20 * _HEAD_START)
    begin = time.perf_counter()
    for _ in range(_CALLS):
        call()
    host = (time.perf_counter() - begin) / _CALLS
    clock.wait()

    def per_call(run: Callable[[], object], *, ahead: bool) -> float:
        spans = []
        for _ in range(_CALLS):
            if ahead:
                clock.start()
            before = clock.mark()
            run()
            spans.append((before, clock.mark()))
            if not ahead:
                clock.wait()
        clock.wait()
        return median(clock.milliseconds(*span) for span in spans)

    costs: dict[str, Any] = {
        "host_us": 1e6 * host,
        "eager_ms": per_call(call, ahead=False),
        "device_ms": per_call(call, ahead=True),
        "graph_ms": None,
    }
    if clock.on_gpu:
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            costs["graph_ms"] = per_call(graph.replay, ahead=False)
        except Exception as error:
            costs["graph_error"] = f"{type(error).__name__}: {error}"[:200]
    return costs
