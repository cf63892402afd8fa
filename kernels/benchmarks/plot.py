"""Plot time and speed-up over length: `python -m s2train.kernels.benchmarks.plot FILE.json [FILE.png]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .cases import Case, parse_case, tokens
from .report import Record, density_series, launch_ratios, series, speedups

# Okabe and Ito's palette, with a distinct marker for each: distinguishable with any colour vision, and in grey
_STYLES = {
    "ours": ("#D55E00", "o", "s2train"),
    "flex": ("#0072B2", "s", "FlexAttention"),
    "dkernel": ("#CC79A7", "v", "dkernel"),
    "cudnn": ("#009E73", "^", "cuDNN, dense"),
    "flash2": ("#56B4E9", "D", "FlashAttention-2, dense"),
}
_GREY = "#555555"
_PARTS = {"forward": "forward", "both": "forward + backward"}


def draw(data: Record, path: Path, case: str = "b128-l8-v16-32k") -> None:
    """Draw a PNG of a case's mask over length.

    Forward is in the upper row, forward + backward in the lower. A third column has the speed-up over density at the
    case's length, and that of single calls (eager and from CUDA graphs) at the lengths whose launches were measured.
    Either is blank without data (fewer than three densities). Raises ValueError if there is nothing to draw.
    """
    like = parse_case(case)
    along = [record for record in series(data["cases"], like) if _times(record, "both")]
    across = [record for record in density_series(data["cases"], like) if speedups(record, "both")]
    across = across if len(across) > 2 else []
    calls = sorted(
        (r for r in data.get("launches", []) if launch_ratios(r, "eager_ms")),
        key=lambda r: parse_case(r["case"]).length,
    )
    if not along:
        raise ValueError(f"no case like {case} has times")
    columns = 3 if across or calls else 2
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.93), wspace=0.05, hspace=0.07)
    figure = Figure(figsize=(4.6 * columns, 7.6), dpi=150, layout=engine)
    grid = figure.subplots(2, columns)
    for row, (part, words) in zip(grid, _PARTS.items(), strict=True):
        _draw_times(row[0], along, part)
        row[0].set_title(f"{words}: time (ms)", loc="left", fontsize=10)
        _draw_speedups(row[1], along, "length", part)
        row[1].set_title(f"{words}: peer's time / s2train's", loc="left", fontsize=10)
        for panel in row[:2]:
            _length_ticks(panel, [record["length"] for record in along])
    if columns == 3:
        _draw_density(grid[0][2], across, like)
        _draw_calls(grid[1][2], calls)
    handles, labels = grid[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    title = f"Attention on one {data['machine']['device']}"
    figure.text(0.012, 0.99, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 0.957, _subtitle(like), va="top", fontsize=9, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _subtitle(case: Case) -> str:
    return (
        f"bf16, batch 1, {case.heads} query and {case.kv_heads} KV heads × {case.dim} · "
        f"sparse: blocks of {case.block}, {case.local} local, every {case.stride}th"
    )


def _times(record: Record, part: str) -> dict[str, float]:
    return {name: result["ms"][part] for name, result in record["results"].items() if "ms" in result}


def _draw_times(axes: Axes, records: list[Record], part: str) -> None:
    for name, (colour, mark, label) in _STYLES.items():
        points = [(r["length"], _times(r, part)[name]) for r in records if name in _times(r, part)]
        if points:
            _line(axes, points, colour, mark, label, strong=name == "ours")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _tidy(axes)


def _draw_speedups(axes: Axes, records: list[Record], key: str, part: str) -> None:
    """Draw each peer's line, labelled with the ratio at its end.

    The end is the largest length or the lowest density.
    """
    ends: list[tuple[float, float, str]] = []
    for name, (colour, mark, label) in _STYLES.items():
        found = [(r[key], speedups(r, part).get(name)) for r in records]
        points = [(x, ratio) for x, ratio in found if ratio is not None]
        if points:
            _line(axes, points, colour, mark, label)
            ends.append((*(points[-1] if key == "length" else points[0]), colour))
    axes.set_xscale("log", base=2 if key == "length" else 10)
    axes.margins(x=0.17, y=0.06)
    _ratio_axis(axes)
    _write_ends(axes, ends, right=key == "length")


def _draw_density(axes: Axes, records: list[Record], like: Case) -> None:
    if not records:
        axes.set_axis_off()
        return
    _draw_speedups(axes, records, "density", "both")
    axes.set_title(f"forward + backward over density, {tokens(like.length)} tokens", loc="left", fontsize=10)
    axes.set_xlabel("density (kept / causal positions)")
    axes.set_xticks([0.03, 0.1, 0.3, 1], ["3 %", "10 %", "30 %", "100 %"])


def _draw_calls(axes: Axes, records: list[Record]) -> None:
    """Draw single calls, forward + backward.

    Hollow marks include host time and idle gaps; filled ones are from CUDA graphs.
    """
    if not records:
        axes.set_axis_off()
        return
    for name, (colour, mark, label) in _STYLES.items():
        for measure, dashes in (("graph_ms", "solid"), ("eager_ms", "dashed")):
            found = [(parse_case(r["case"]).length, launch_ratios(r, measure).get(name)) for r in records]
            points = [(x, pair[1]) for x, pair in found if pair is not None]
            if points:
                _line(axes, points, colour, mark, label, dashes=dashes)
    axes.set_xscale("log", base=2)
    axes.margins(x=0.17, y=0.06)
    _ratio_axis(axes)
    _length_ticks(axes, [parse_case(r["case"]).length for r in records])
    axes.set_title(
        "forward + backward, one call: peer's time / s2train's\nfilled: CUDA graph; hollow: eager, host included",
        loc="left",
        fontsize=10,
    )


def _write_ends(axes: Axes, ends: list[tuple[float, float, str]], right: bool) -> None:
    """Write ratios at the lines' ends, without overlaps."""
    low, high = axes.get_ylim()
    apart = (high / low) ** 0.055
    above = 0.0
    for x, ratio, colour in sorted(ends, key=lambda end: end[1]):
        at = max(ratio, above * apart)
        axes.annotate(
            f"{ratio:.{0 if ratio > 9.95 else 1}f}×", (x, at), xytext=(8 if right else -8, 0),
            textcoords="offset points", ha="left" if right else "right", va="center", fontsize=9, color=colour,
            fontweight="bold",
        )  # fmt: skip
        above = at


def _ratio_axis(axes: Axes) -> None:
    axes.axhline(1, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    wanted = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100)
    ticks = [tick for tick in wanted if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}×" for tick in ticks])
    _tidy(axes)


def _length_ticks(axes: Axes, lengths: list[int]) -> None:
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    axes.set_xlabel("length (tokens)")


def _line(
    axes: Axes, points: list[Any], colour: str, mark: str, label: str, strong: bool = False, dashes: str = "solid"
) -> None:
    xs, ys = zip(*points, strict=True)
    width, size, above = (2.6, 6, 4) if strong else (1.6, 5, 3)
    axes.plot(
        xs, ys, color=colour, marker=mark, markersize=size, linewidth=width, label=label, zorder=above,
        linestyle=dashes, markerfacecolor=colour if dashes == "solid" else "white",
    )  # fmt: skip


def _tidy(axes: Axes) -> None:
    axes.minorticks_off()
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, length=3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.benchmarks.plot", description=__doc__)
    parser.add_argument("json", type=Path, help="output of the benchmark")
    parser.add_argument("png", type=Path, nargs="?", help="default: JSON's path, with .png")
    parser.add_argument("--case", default="b128-l8-v16-32k", help="mask, heads and (for densities) length to draw")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png or args.json.with_suffix(".png"), args.case)


if __name__ == "__main__":
    main()
