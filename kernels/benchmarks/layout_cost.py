"""Measure the cost of building layouts and schedules: time, memory, host waits.

For each case (words such as b64-l16-v16-128k) the layout is built from columns, as in models; from a rule that is
evaluated pair by pair; and, if that is at most 2^27 pairs, from whole masks. All must be equal. Then the schedules of
the Hopper kernels are built from that layout. Peak memory is the maximum during the build, including its result.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ..hopper.backward_config import chosen_config
from ..hopper.call_schedule import schedule_of_call
from ..hopper.forward_schedule import forward_schedule
from ..layout import BlockLayout
from ..layout_builder import Rule
from ..spec import AttentionSpec
from .cases import Case, parse_case
from .program import add_output, check_output, write_results

Record = dict[str, Any]
DEFAULT = tuple(f"b{b}-l{1024 // b}-v16-{n}-kv8" for n in ("32k", "128k", "1m") for b in (64, 128))
_MOST_PAIRS_OF_MASKS = 1 << 27
_TENSORS = ("pattern_of_head", "row_offsets", "row_columns", "column_offsets", "column_rows")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Return 1 if layouts differ or a build failed. A failure for lack of memory does not count.
    """
    parser = argparse.ArgumentParser(
        prog="python -m s2train.kernels.benchmarks.layout_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", default=DEFAULT, help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--repeats", type=int, default=5, help="timed builds, after the first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_output(parser, "layout-cost")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    check_output(parser, args)
    try:
        cases = [parse_case(word) for word in args.cases]
    except ValueError as error:
        parser.error(str(error))
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    data: Record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU",
        "torch": torch.__version__,
        "repeats": args.repeats,
        "cases": [],
    }
    console = Console(width=120)
    for case in cases:
        record = measure_case(case, device, args.repeats)
        data["cases"].append(record)
        console.print(_table(record))
        write_results(data, args.output)
    console.print(f"{data['device']}: {args.output}")
    errors = [cost.get("error", "") for record in data["cases"] for cost in record["builds"].values()]
    return int(any(record["differing"] for record in data["cases"]) or any(e.startswith("failed") for e in errors))


def measure_case(case: Case, device: torch.device, repeats: int) -> Record:
    """Measure a case's builds by name; list differing layouts.

    "differing" names the layouts that differ from the first.
    """
    layouts = {"columns": lambda: case.layout(device), "pairs": lambda: layout_of_pairs(case, device)}
    if case.num_patterns * (case.length // case.block) ** 2 <= _MOST_PAIRS_OF_MASKS:
        layouts["masks"] = lambda: layout_of_masks(case, device)
    record: Record = {"case": case.name, "heads": case.heads, "kv_heads": case.kv_heads, "builds": {}, "differing": []}
    layout = case.layout(device)
    record |= {"nbytes": layout.nbytes, "kept_blocks": layout.row_columns.numel()}
    del layout  # free it while the others are built: 1M tokens take a GB
    for name, build in layouts.items():
        record["builds"][name] = _cost(build, device, repeats)
    layout = case.layout(device)
    for name, build in layouts.items():
        if "ms" in record["builds"][name] and not equal(layout, build()):
            record["differing"].append(name)
    lists: dict[str, Callable[[], object]] = {"columns by work": lambda: layout.columns_by_work(case.kv_heads)}
    if case.block >= 64:
        lists["forward work"] = lambda: forward_schedule(layout, causal=True, query_end=case.length, s_k=case.length)
        sizes, spec = (case.kv_heads, case.length, case.length), AttentionSpec(1.0, True, 0, None, "sbhd")
        options = chosen_config(layout, case.dim, *sizes[:2], spec).schedule
        lists["key pairs"] = lambda: schedule_of_call(layout, *sizes, spec, options=options)
    for name, build_list in lists.items():
        record["builds"][name] = _cost(build_list, device, repeats, layout.cache.clear)
    return record


def layout_of_pairs(case: Case, device: torch.device) -> BlockLayout:
    """Build the case's layout from `Case.keeps`, pair by pair."""
    num_blocks = case.length // case.block
    patterns = [h % case.num_patterns for h in range(case.heads)]
    rules = [_rule(case, pattern) for pattern in range(case.num_patterns)]
    return BlockLayout.from_rule(rules, patterns, case.block, num_blocks, num_blocks, device=device)


def layout_of_masks(case: Case, device: torch.device) -> BlockLayout:
    """Build the case's layout from `Case.keeps`, as masks."""
    block = torch.arange(case.length // case.block, device=device)
    masks = torch.stack([_rule(case, p)(block[:, None], block) for p in range(case.num_patterns)])
    return BlockLayout.from_patterns(masks, [h % case.num_patterns for h in range(case.heads)], case.block)


def _rule(case: Case, pattern: int) -> Rule:
    # a pair of blocks is kept if the last query keeps the first key
    return lambda i, j: case.keeps(pattern, i * case.block + case.block - 1, j * case.block)


def equal(one: BlockLayout, other: BlockLayout) -> bool:
    """Return whether both store the same tensors."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in _TENSORS)


def _cost(
    build: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], object] | None = None
) -> Record:
    """Measure a build's time, peak bytes and waits.

    Times are ms of the first build, and the median of `repeats` more. A failed build has "error" instead.
    """

    def milliseconds() -> float:
        if before:
            before()
        _wait(device)
        began = time.perf_counter()
        built = build()
        _wait(device)
        del built
        return 1e3 * (time.perf_counter() - began)

    try:
        record: Record = {"first_ms": milliseconds(), "ms": median(milliseconds() for _ in range(repeats))}
        if before:
            before()
        record["peak_bytes"] = peak_bytes(build, device)
        if before:
            before()
        record["host_waits"] = host_waits(build, device)
        return record
    except torch.OutOfMemoryError as error:
        return {"error": f"out of memory: {error}"[:100]}
    except (RuntimeError, ValueError) as error:
        return {"error": f"failed: {error}"[:100]}


def peak_bytes(build: Callable[[], object], device: torch.device) -> int:
    """Return the maximum additional bytes of tensors during a call."""
    if device.type == "cuda":
        _wait(device)
        there = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        built = build()
        _wait(device)
        del built
        return torch.cuda.max_memory_allocated(device) - there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        build()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def host_waits(build: Callable[[], object], device: torch.device) -> int | None:
    """Count how often PyTorch makes the host wait in a call.

    Return None on a CPU.
    """
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            build()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _table(record: Record) -> Table:
    title = f"{record['case']}: {record['kept_blocks']:,} kept blocks, {record['nbytes'] / 1e6:.1f} MB"
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    for heading in ("first ms", "ms", "peak MB", "host waits"):
        table.add_column(heading, justify="right")
    for name, cost in record["builds"].items():
        if "error" in cost:
            table.add_row(name, cost["error"])
            continue
        waits = "-" if cost["host_waits"] is None else str(cost["host_waits"])
        table.add_row(name, f"{cost['first_ms']:.1f}", f"{cost['ms']:.1f}", f"{cost['peak_bytes'] / 1e6:.1f}", waits)
    if record["differing"]:
        table.caption = f"differing from the first: {', '.join(record['differing'])}"
    return table


if __name__ == "__main__":
    sys.exit(main())
