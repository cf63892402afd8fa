"""Format records as terminal tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from .cases import parse_case
from .contenders import CONTENDERS
from .report import PARTS, Record, kernel_paths, launch_ratios, speedups


def case_table(record: Record, ceiling: float) -> Table:
    """Tabulate one case: each contender's figures, its time over ours, our kernels.

    Figures are time, rate, share of the ceiling and memory.
    """
    table = _table(f"{record['case']}, density {record['density']:.3f}")
    for heading in ("forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "both ms", "TFLOP/s", "of ceiling", "over ours",
                    "GiB", "spread", "kernels"):  # fmt: skip
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
            kernel_paths(result) if name == "ours" else "",
        )
    table.caption = "\n".join(remarks)
    return table


def overview_table(records: Sequence[Record]) -> Table:
    """Tabulate cases: our ms and TFLOP/s, and each peer's time over ours."""
    peers = [name for name in CONTENDERS if any(name in speedups(record, "both") for record in records)]
    table = _table("s2train's ms (TFLOP/s), and peers' time over it: forward / backward / both")
    for heading in ("density", "kernels", "forward", "backward", "both", *(CONTENDERS[name].label for name in peers)):
        table.add_column(heading, justify="right")
    for record in records:
        ours = record["results"].get("ours", {})
        if "ms" not in ours:
            table.add_row(record["case"], f"{record['density']:.3f}", ours.get("error", "")[:60])
            continue
        cells = [f"{record['density']:.3f}", kernel_paths(ours)]
        cells += [f"{ours['ms'][part]:.3f} ({ours['tflops'][part]:.0f})" for part in PARTS]
        for name in peers:
            ratios = [speedups(record, part).get(name) for part in PARTS]
            cells.append(" / ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
        table.add_row(record["case"], *cells)
    return table


def launch_table(record: Record) -> Table:
    """Tabulate host time and the savings by graphs at one case."""
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


def short_table(records: Sequence[Record]) -> Table:
    """Tabulate peers' single calls over ours, eager and from CUDA graphs.

    Takes launch records, and lists peers that are faster.
    """
    table = _table("one call, peers' time over s2train's: forward / forward and backward")
    peers = [name for name in CONTENDERS if any(name in record["results"] for record in records) and name != "ours"]
    for heading in ("", *(CONTENDERS[name].label for name in peers)):
        table.add_column(heading, justify="right")
    slower = []
    for record in sorted(records, key=lambda record: parse_case(record["case"]).length):
        for measure, how in (("eager_ms", "eager"), ("graph_ms", "CUDA graph")):
            ratios = launch_ratios(record, measure)
            cells = [" / ".join(f"{ratio:.2f}" for ratio in ratios[name]) if name in ratios else "-" for name in peers]
            table.add_row(record["case"], how, *cells)
            slower += [
                f"{record['case']}, {how}, {part}: {CONTENDERS[name].label} is faster"
                for name, pair in ratios.items()
                for part, ratio in zip(("forward", "forward and backward"), pair, strict=True)
                if ratio < 1
            ]
    table.caption = "\n".join(slower)
    return table


def break_even_table(found: Record) -> Table:
    """Tabulate where s2train becomes faster than cuDNN's dense attention."""
    table = _table("break-even with dense cuDNN")
    for part in PARTS:
        table.add_column(part, justify="right")
    for kind, unit, everywhere in (
        ("length", "from {:,.0f} tokens", "at every length, {:,.0f} tokens on"),
        ("density", "below {:.2f}", "at every density, up to {:.2f}"),
    ):
        for name, parts in found.get(f"break_even_{kind}", {}).items():
            cells = []
            for part in PARTS:
                at, bound = parts[part]["at"], parts[part]["bound"]
                cells.append("never" if at is None else (everywhere if bound == "end" else unit).format(at))
            table.add_row(name, *cells)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 1))
    table.add_column("", no_wrap=True)
    return table
