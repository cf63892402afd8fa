"""Computes where a step's time goes, from a torch.profiler trace.

On a GPU the times are those of kernels. A kernel belongs to the range in which it was launched, or else to the part
that its name indicates. On a CPU these are the operators' self times, without the operators that they call.
"""

import bisect
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2train.training.idle_time import RUNTIME_CALLS, Interval, idle_by_cause

RANGE = "s2train: "  # prefix of our ranges' names
LINEAR, ELEMENTWISE = "linear layers", "norms, elementwise, loss"
COMMUNICATION, HIDDEN, DATA, HOST = "communication", "communication beside compute", "data", "host"
OPTIMIZER = "optimizer"

_GEMM = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|splitk", re.IGNORECASE)
_COMMUNICATION = re.compile(r"nccl|^c10d::|^gloo:|PtoP", re.IGNORECASE)  # PtoP: copies between GPUs
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"}
_KERNELS = {"kernel", "gpu_memcpy", "gpu_memset"}
_MOST_CAUSES = 6  # of idle time, in the table


@dataclass(frozen=True)
class ProfileTable:
    """Milliseconds of each part of a step, averaged over the traced steps.

    Attributes:
        steps: number of traced steps.
        device: "cuda" or "cpu".
        step_ms: time of a whole step.
        parts: time of each part. They add up to `step_ms`, except `HIDDEN`, which is communication while kernels
            compute. `HOST` is the remainder: on a GPU, the time in which the GPU is idle.
        idle: what a GPU waited for, as `idle_by_cause` names it, in milliseconds.
    """

    steps: int
    device: str
    step_ms: float
    parts: dict[str, float]
    idle: dict[str, float] = field(default_factory=dict)

    def format(self) -> str:
        """Format as a table, largest part first."""
        from rich import box  # slow to import, and only a profile needs it
        from rich.console import Console
        from rich.table import Table

        table = Table("part", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("ms/step", justify="right")
        table.add_column("share", justify="right")
        for name, time in sorted(self.parts.items(), key=lambda part: -part[1]):
            table.add_row(name, f"{time:.2f}", "" if name == HIDDEN else f"{time / self.step_ms:.1%}")
        table.add_row("step", f"{self.step_ms:.2f}", "")
        console = Console(width=100)
        with console.capture() as capture:
            console.print(table)
        text = capture.get().rstrip()
        causes = [f"{cause} {time:.2f}" for cause, time in list(self.idle.items())[:_MOST_CAUSES]]
        return f"{text}\nthe GPU was idle until these had launched, in ms: {'; '.join(causes)}" if causes else text


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Read the timed events of a Chrome trace, in microseconds."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def profile_table(events: Sequence[dict[str, Any]]) -> ProfileTable:
    """Split the time of the traced steps into parts.

    Raises:
        ValueError: the trace holds no step.
    """
    steps = [
        _interval(e) for e in events if e["name"].startswith("ProfilerStep#") and e.get("cat") != "gpu_user_annotation"
    ]
    if not steps:
        raise ValueError("the trace holds no ProfilerStep. Record it by torch.profiler with its schedule argument")
    ranges = _Ranges(events)
    kernels = [e for e in events if e.get("cat") in _KERNELS]
    idle: dict[str, float] = {}
    if kernels:
        launches = {
            event["args"]["correlation"]: event
            for event in events
            if event.get("cat") in RUNTIME_CALLS and "correlation" in event.get("args", {})
        }
        times = _kernel_times(kernels, launches, ranges, steps)
        idle = idle_by_cause(kernels, launches, events, steps)
    else:
        times = _operator_times(events, ranges, steps)
    whole = sum(end - start for start, end in steps)
    # The remainder is time without an operator or kernel, such as waiting for a batch.
    times[HOST] = max(whole - sum(time for name, time in times.items() if name != HIDDEN), 0.0)
    scale = 1e-3 / len(steps)
    parts = {name: time * scale for name, time in times.items() if time > 0}
    idle = {cause: time * scale for cause, time in idle.items()}
    return ProfileTable(len(steps), "cuda" if kernels else "cpu", whole * scale, parts, idle)


class _Ranges:
    """Our profiler ranges by thread, searchable by time."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        self._of: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith(RANGE):
                self._of[event["tid"]].append((*_interval(event), event["name"].removeprefix(RANGE)))
        for ranges in self._of.values():
            ranges.sort()

    def at(self, thread: Any, moment: float) -> str | None:
        """Name of a thread's innermost range at a moment, or None."""
        ranges = self._of.get(thread, [])
        place = bisect.bisect_right(ranges, (moment, float("inf"), ""))
        # Our ranges nest two deep at most (recomputation inside a backward), so a few earlier ones are enough.
        return next((name for _, end, name in reversed(ranges[max(place - 8, 0) : place]) if end > moment), None)


def _kernel_times(
    kernels: Iterable[dict[str, Any]],
    launches: Mapping[int, dict[str, Any]],
    ranges: _Ranges,
    steps: Sequence[Interval],
) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    compute: list[Interval] = []
    communication: list[Interval] = []
    for kernel in kernels:
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        if _COMMUNICATION.search(kernel["name"]):
            if _within((launch or kernel)["ts"], steps):  # count it even if its launch was not traced
                communication.append(_interval(kernel))
            continue
        if launch is None or not _within(launch["ts"], steps):
            continue
        compute.append(_interval(kernel))
        where = ranges.at(launch["tid"], launch["ts"])
        times[where or (LINEAR if _GEMM.search(kernel["name"]) else ELEMENTWISE)] += kernel["dur"]
    busy, computing = _covered([*compute, *communication]), _covered(compute)
    times[COMMUNICATION] = busy - computing
    times[HIDDEN] = _covered(communication) - times[COMMUNICATION]
    # Concurrent kernels on two streams would count twice: scale their sum to the time covered.
    summed = sum(end - start for start, end in compute)
    if summed > computing:
        for name in times:
            if name not in (COMMUNICATION, HIDDEN):
                times[name] *= computing / summed
    return times


def _operator_times(events: Iterable[dict[str, Any]], ranges: _Ranges, steps: Sequence[Interval]) -> dict[str, float]:
    main = max(
        (event for event in events if event["name"].startswith("ProfilerStep#")), key=lambda event: event["dur"]
    )["tid"]
    operators = sorted(
        (event for event in events if event.get("cat") == "cpu_op" and event["tid"] == main),
        key=lambda event: (event["ts"], -event["dur"]),
    )
    times: dict[str, float] = defaultdict(float)
    stack: list[tuple[float, str]] = []  # end, part
    for event in operators:
        start, end = _interval(event)
        if not _within(start, steps):
            continue
        while stack and stack[-1][0] <= start:
            stack.pop()
        part = ranges.at(main, start) or _part_of_operator(event["name"], stack[-1][1] if stack else None)
        if stack:
            times[stack[-1][1]] -= end - start  # self time of the caller excludes its callees
        times[part] += end - start
        stack.append((end, part))
    return times


def _part_of_operator(name: str, caller: str | None) -> str:
    if _COMMUNICATION.search(name):
        return COMMUNICATION
    if name in _PRODUCTS or caller == LINEAR:
        return LINEAR
    return ELEMENTWISE


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _within(moment: float, intervals: Sequence[Interval]) -> bool:
    return any(start <= moment < end for start, end in intervals)


def _covered(intervals: Iterable[Interval]) -> float:
    """Total length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total
