"""Time and speed-up over length, from the JSON: `python -m s2train.kernels.benchmarks.plot FILE.json [FILE.png]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .cases import Case, parse_case, tokens
from .report import Record, density_series, series, speedups

# Okabe and Ito's palette, and a mark of its own for each: told apart with any kind of colour vision, and in grey
_STYLES = {
    "ours": ("#D55E00", "o", "s2train"),
    "flex": ("#0072B2", "s", "FlexAttention"),
    "dkernel": ("#CC79A7", "v", "dkernel"),
    "cudnn": ("#009E73", "^", "cuDNN, dense"),
    "flash2": ("#56B4E9", "D", "FlashAttention-2, dense"),
}
_GREY = "#555555"


def draw(data: Record, path: Path, case: str = "b128-l8-v16-32k") -> None:
    """Forward + backward of a case's mask over length, and of its length and heads over density; PNG.

    The density panel is left out where there are fewer than three densities. Raises ValueError where there
    is nothing to draw.
    """
    like = parse_case(case)
    along = [record for record in series(data["cases"], like) if _times(record)]
    across = [record for record in density_series(data["cases"], like) if speedups(record, "both")]
    if not along:
        raise ValueError(f"no case like {case} has times")
    panels = 3 if len(across) > 2 else 2
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.88), wspace=0.06)
    figure = Figure(figsize=(4.4 * panels, 4.4), dpi=160, layout=engine)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    _draw_times(axes[0], along)
    _draw_speedups(axes[1], along, "length")
    for panel in axes[:2]:
        lengths = [record["length"] for record in along]
        panel.set_xticks(lengths, [tokens(length) for length in lengths])
        panel.set_xlabel("length (tokens)")
    if panels == 3:
        _draw_speedups(axes[2], across, "density")
        axes[2].set_title(f"… and over density, {tokens(like.length)} tokens", loc="left", fontsize=10)
        axes[2].set_xlabel("density (kept / causal positions)")
        axes[2].set_xticks([0.03, 0.1, 0.3, 1], ["3 %", "10 %", "30 %", "100 %"])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    title = f"Attention forward + backward on one {data['machine']['device']}"
    figure.text(0.012, 0.985, title, va="top", fontsize=12, fontweight="bold")
    figure.text(0.012, 0.925, _subtitle(like), va="top", fontsize=9, color=_GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _subtitle(case: Case) -> str:
    return (
        f"bf16, batch 1, {case.heads} query and {case.kv_heads} KV heads × {case.dim} · "
        f"sparse: blocks of {case.block}, {case.local} local, every {case.stride}th"
    )


def _times(record: Record) -> dict[str, float]:
    return {name: result["ms"]["both"] for name, result in record["results"].items() if "ms" in result}


def _draw_times(axes: Axes, records: list[Record]) -> None:
    for name, (colour, mark, label) in _STYLES.items():
        points = [(r["length"], _times(r)[name]) for r in records if name in _times(r)]
        if points:
            _line(axes, points, colour, mark, label, strong=name == "ours")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("time (ms)", loc="left", fontsize=10)
    _tidy(axes)


def _draw_speedups(axes: Axes, records: list[Record], key: str) -> None:
    last: list[float] = []
    for name, (colour, mark, label) in _STYLES.items():
        found = [(r[key], speedups(r, "both").get(name)) for r in records]
        points = [(x, ratio) for x, ratio in found if ratio is not None]
        if not points:
            continue
        _line(axes, points, colour, mark, label)
        x, ratio = points[-1] if key == "length" else points[0]
        if all(abs(ratio / other - 1) > 0.12 for other in last):
            offset, side = ((7, 0), "left") if key == "length" else ((-7, 0), "right")
            axes.annotate(
                f"{ratio:.{0 if ratio > 9.95 else 1}f}×", (x, ratio), xytext=offset, textcoords="offset points",
                ha=side, va="center", fontsize=9, color=colour, fontweight="bold",
            )  # fmt: skip
            last.append(ratio)
    axes.axhline(1, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xscale("log", base=2 if key == "length" else 10)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [t for t in (0.25, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 50, 100) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    axes.set_title("speed-up: peer's time / s2train's", loc="left", fontsize=10)
    axes.margins(x=0.17, y=0.06)
    _tidy(axes)


def _line(axes: Axes, points: list[Any], colour: str, mark: str, label: str, strong: bool = False) -> None:
    xs, ys = zip(*points, strict=True)
    width, size, above = (2.6, 6, 4) if strong else (1.6, 5, 3)
    axes.plot(xs, ys, color=colour, marker=mark, markersize=size, linewidth=width, label=label, zorder=above)


def _tidy(axes: Axes) -> None:
    axes.minorticks_off()
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, length=3)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m s2train.kernels.benchmarks.plot", description=__doc__)
    parser.add_argument("json", type=Path, help="what the benchmark wrote")
    parser.add_argument("png", type=Path, nargs="?", help="default: beside it")
    parser.add_argument("--case", default="b128-l8-v16-32k", help="mask, heads and (for densities) length to draw")
    args = parser.parse_args()
    draw(json.loads(args.json.read_text()), args.png or args.json.with_suffix(".png"), args.case)


if __name__ == "__main__":
    main()
