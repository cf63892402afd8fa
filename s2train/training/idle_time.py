"""Attributes a GPU's idle time in a trace to the host's work.

The GPU idles until the next kernel starts. What delayed it is the operator that launched it, or a call before it in
which the host waited for the GPU.
"""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]
Interval = tuple[float, float]

RUNTIME_CALLS = {"cuda_runtime", "cuda_driver"}  # categories of events
_WAITS = re.compile(r"Synchronize$")  # of streams, events, the device; copies to the host end with one
_BACKWARD = "autograd::engine::evaluate_function: "


def idle_by_cause(
    kernels: Iterable[Event], launches: Mapping[int, Event], events: Sequence[Event], steps: Sequence[Interval]
) -> dict[str, float]:
    """Sum idle time by the operator whose kernel ended it, largest first.

    Operators are the outermost ones of their thread, with "after cudaStreamSynchronize" and the like where the host had
    waited since the last kernel ended. Times are those of the trace. Idle time at a step's end is not counted, as no
    kernel ends it.

    Args:
        kernels: all that ran, copies and sets of memory too.
        launches: runtime calls by correlation.
        events: of the whole trace.
        steps: traced steps.
    """
    operators = _Outermost(event for event in events if event.get("cat") == "cpu_op")
    waits = sorted((event["ts"] + event["dur"], event["name"]) for event in events if _is_wait(event))
    found: dict[str, float] = defaultdict(float)
    busy_until = float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel["ts"]):
        start = kernel["ts"]
        launch = launches.get(kernel.get("args", {}).get("correlation"))
        step = next((step for step in steps if step[0] <= start < step[1]), None)
        if step is not None and launch is not None:
            idle_from = max(busy_until, step[0])
            if start > idle_from:
                cause = operators.at(launch["tid"], launch["ts"]) or launch["name"]
                if (wait := _last_wait(waits, idle_from, launch["ts"])) is not None:
                    cause = f"{cause} after {wait}"
                found[cause] += start - idle_from
        busy_until = max(busy_until, start + kernel["dur"])
    return dict(sorted(found.items(), key=lambda cause: -cause[1]))


def _is_wait(event: Event) -> bool:
    return event.get("cat") in RUNTIME_CALLS and _WAITS.search(event["name"]) is not None


def _last_wait(waits: Sequence[tuple[float, str]], after: float, before: float) -> str | None:
    """Name the last call between two moments in which the host waited."""
    place = bisect.bisect_right(waits, (before, "\U0010ffff"))
    if place == 0 or waits[place - 1][0] < after:
        return None
    return waits[place - 1][1]


class _Outermost:
    """Operators that no other operator of their thread calls, searchable by time."""

    def __init__(self, operators: Iterable[Event]) -> None:
        self._of: dict[Any, list[tuple[float, float, str]]] = defaultdict(list)
        for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
            known = self._of[event["tid"]]
            if not known or event["ts"] >= known[-1][1]:
                known.append((event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(_BACKWARD)))

    def at(self, thread: Any, moment: float) -> str | None:
        """Name a thread's outermost operator at a moment."""
        known = self._of.get(thread, [])
        place = bisect.bisect_right(known, (moment, float("inf"), ""))
        if place == 0 or known[place - 1][1] <= moment:
            return None
        return known[place - 1][2]
