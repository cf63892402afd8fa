"""From records to what people read: ratios, break-even points, tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from .cases import Case, parse_case
from .contenders import CONTENDERS

Record = dict[str, Any]
PARTS = ("forward", "backward", "both")


def speedups(record: Record, part: str) -> dict[str, float]:
    """Time of each peer over ours, for the peers that have one."""
    results = record["results"]
    ours = results.get("ours", {}).get("ms")
    if ours is None:
        return {}
    return {name: r["ms"][part] / ours[part] for name, r in results.items() if name != "ours" and "ms" in r}


def best_peer(record: Record, part: str) -> tuple[str, float] | None:
    """The fastest peer that computes the same mask, and its time over ours."""
    peers = {name: ratio for name, ratio in speedups(record, part).items() if CONTENDERS[name].sparse}
    return min(peers.items(), key=lambda item: item[1]) if peers else None


def series(records: Sequence[Record], like: Case) -> list[Record]:
    """Records that differ from a case in length alone, shortest first."""
    fields = ("block", "local", "stride", "heads", "kv_heads", "dim")
    return sorted(
        (r for r in records if all(r[f] == getattr(like, f) for f in fields)), key=lambda record: record["length"]
    )


def density_series(records: Sequence[Record], like: Case) -> list[Record]:
    """Records with a case's length, block and heads and any pattern, sparsest first."""
    fields = ("block", "length", "heads", "kv_heads", "dim")
    return sorted(
        (r for r in records if all(r[f] == getattr(like, f) for f in fields)), key=lambda record: record["density"]
    )


def break_even(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Where a speed-up over x passes 1, between measured points linear in the logarithms of both.

    Args:
        points: (x, speed-up), ascending in x.
    Returns:
        "at": the first x from which on (in the order given) the speed-up is at least 1; None if it never is.
        "bound": "measured" where it is between two points, "end" where it already holds at the first.
    """
    if points[-1][1] < 1:
        return {"at": None, "bound": "measured"}
    at = len(points) - 1
    while at > 0 and points[at - 1][1] >= 1:
        at -= 1
    if at == 0:
        return {"at": points[0][0], "bound": "end"}
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    share = -math.log(y0) / (math.log(y1) - math.log(y0))
    return {"at": math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))), "bound": "measured"}


def summary(records: Sequence[Record]) -> Record:
    """Ratios by case and part, and the break-even length and density against cuDNN by series and part."""
    ratios = {
        r["case"]: {
            part: {"over": speedups(r, part), "best_peer": best_peer(r, part)} for part in PARTS if speedups(r, part)
        }
        for r in records
    }
    lengths: dict[str, Record] = {}
    densities: dict[str, Record] = {}
    for record in records:
        case = parse_case(record["case"])
        heads = f"{case.heads}/{case.kv_heads} d{case.dim}"
        along, across = series(records, case), density_series(records, case)
        if len(_points(along, "length", "both")) > 1:
            lengths[f"{case.mask_name} {heads}"] = {p: break_even(_points(along, "length", p)) for p in PARTS}
        if len(_points(across, "density", "both")) > 2:
            # from dense to sparse: the density below which ours is faster
            name = f"b{case.block} {case.length} tokens {heads}"
            densities[name] = {p: break_even(_points(across, "density", p)[::-1]) for p in PARTS}
    return {"ratios": ratios, "break_even_length": lengths, "break_even_density": densities}


def _points(records: Sequence[Record], key: str, part: str) -> list[tuple[float, float]]:
    found = [(record[key], speedups(record, part).get("cudnn")) for record in records]
    return [(x, ratio) for x, ratio in found if ratio is not None]


def case_table(record: Record, ceiling: float) -> Table:
    """One case: time, rate, share of the ceiling and memory of each contender, and its time over ours."""
    table = _table(f"{record['case']}, density {record['density']:.3f}")
    for heading in ("forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "both ms", "TFLOP/s", "of ceiling", "over ours",
                    "GiB", "spread"):  # fmt: skip
        table.add_column(heading, justify="right")
    ratios = speedups(record, "both")
    remarks = []
    for name, result in record["results"].items():
        label = CONTENDERS[name].label
        if "ms" not in result:
            remarks.append(f"{label}: {result['error']}")
            continue
        cells = []
        for part in PARTS:
            cells += [f"{result['ms'][part]:.3f}", f"{result['tflops'][part]:.0f}"]
        peak = result["peak_bytes"]
        table.add_row(
            label,
            *cells,
            f"{100 * result['tflops']['both'] / ceiling:.0f} %",
            f"{ratios[name]:.2f}" if name in ratios else "",
            "" if peak is None else f"{peak / 2**30:.2f}",
            f"{100 * result['spread']:.0f} %",
        )
    kernels = record["results"].get("ours", {}).get("kernels")
    if kernels:
        remarks.insert(0, "s2train ran " + ", ".join(kernels))
    table.caption = "\n".join(remarks)
    return table


def overview_table(records: Sequence[Record]) -> Table:
    """A line a case: our ms and TFLOP/s, and each peer's time over ours."""
    peers = [name for name in CONTENDERS if any(name in speedups(record, "both") for record in records)]
    table = _table("s2train's ms (TFLOP/s), and peers' time over it: forward / backward / both")
    for heading in ("forward", "backward", "both", *(CONTENDERS[name].label for name in peers)):
        table.add_column(heading, justify="right")
    for record in records:
        ours = record["results"].get("ours", {})
        if "ms" not in ours:
            table.add_row(record["case"], ours.get("error", "")[:40])
            continue
        cells = [f"{ours['ms'][part]:.3f} ({ours['tflops'][part]:.0f})" for part in PARTS]
        for name in peers:
            ratios = [speedups(record, part).get(name) for part in PARTS]
            cells.append(" / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
        table.add_row(record["case"], *cells)
    return table


def launch_table(record: Record) -> Table:
    """Host time and what graphs save, at one case."""
    table = _table(f"launches at {record['case']}: forward / forward and backward")
    for heading in ("host us", "eager ms", "graph ms", "device ms"):
        table.add_column(heading, justify="right")
    remarks = []
    for name, result in record["results"].items():
        label = CONTENDERS[name].label
        if "error" in result:
            remarks.append(f"{label}: {result['error']}")
            continue
        parts = (result["forward"], result["both"])
        cells = [" / ".join(f"{costs['host_us']:.0f}" for costs in parts)]
        cells += [
            " / ".join("-" if costs[key] is None else f"{costs[key]:.3f}" for costs in parts)
            for key in ("eager_ms", "graph_ms", "device_ms")
        ]
        table.add_row(label, *cells)
    table.caption = "\n".join(remarks)
    return table


def break_even_table(found: Record) -> Table:
    """Where s2train becomes faster than cuDNN's dense attention."""
    table = _table("break-even with dense cuDNN")
    for part in PARTS:
        table.add_column(part, justify="right")
    for kind, unit in (("length", "from {:,.0f} tokens"), ("density", "below {:.2f}")):
        for name, parts in found[f"break_even_{kind}"].items():
            cells = []
            for part in PARTS:
                at, bound = parts[part]["at"], parts[part]["bound"]
                cells.append("never" if at is None else unit.format(at) + (" or sooner" if bound == "end" else ""))
            table.add_row(name, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    return table
