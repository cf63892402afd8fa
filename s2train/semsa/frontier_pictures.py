"""Draws merged frontiers over density and time, and chosen rules."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from matplotlib.axes import Axes

from s2train.layouts.counting import kept_share
from s2train.layouts.patterns import Dense, GlobalBlocks, LocalVertical, Pattern, SlidingWindow, Span
from s2train.pictures.png import write_png
from s2train.pictures.style import DENSE as DENSE_COLOUR
from s2train.pictures.style import GREY, Sheet, plain
from s2train.semsa.frontier_points import NAMES, TRAINED
from s2train.semsa.pictures import COLOURS, draw_heads
from s2train.semsa.rules import pattern_of

_LINEAR = 0.01  # changes below it are drawn on a linear scale


def draw_axes(path: Path, content: Mapping[str, Any]) -> None:
    """Draw the change of the loss over density and attention time.

    Without times, over density alone. Marks are means over models, with bars from the lowest to the highest: open marks
    without training, filled ones after it.
    """
    rows, dense = content["rows"], content["dense_times"]
    is_timed = any(row["forward_backward_ms"] is not None for row in rows)
    sheet = Sheet(14.0 if is_timed else 7.4, 5.6)
    sheet.text(0.45, 0.2, f"{content['model']}: held-out loss at {content['seq_length']:,} tokens", size=12, bold=True)
    seeds = len(content["folders"])
    words = f"{seeds} model{'s' if seeds > 1 else ''}; open marks: without training"
    if content["steps"] is not None:
        words += f"; filled marks: after {content['steps']} further steps, against dense after the same number"
    sheet.text(0.45, 0.5, words, colour=GREY)
    axes = sheet.axes(0.95, 0.95, 6.0, 3.7)
    _curves(axes, rows, "density")
    axes.set_xlabel("density: share of causal positions that heads keep", fontsize=8.5, color=GREY)
    axes.set_ylabel("change of the held-out loss (nats per token)", fontsize=8.5, color=GREY)
    handles, labels = axes.get_legend_handles_labels()
    if is_timed:
        second = sheet.axes(7.7, 0.95, 6.0, 3.7)
        second.sharey(axes)
        _curves(second, rows, "forward_backward_ms")
        times = [time["forward_backward_ms"] for time in dense if time]
        if times:
            line = second.axvline(statistics.fmean(times), color=DENSE_COLOUR, linewidth=1.2, linestyle=":")
            handles, labels = [*handles, line], [*labels, "dense"]
        second.set_xlabel("attention, forward and backward, all layers (ms, measured)", fontsize=8.5, color=GREY)
        longest = max([row["forward_backward_ms"] or 0 for row in rows] + times)
        second.set_xlim(0, 1.05 * longest)
    columns, place = 6 if is_timed else 3, (0.5, 0.005)
    sheet.figure.legend(
        handles, labels, loc="lower center", bbox_to_anchor=place, ncol=columns, frameon=False, fontsize=8
    )
    write_png(sheet.figure, path)


def _curves(axes: Axes, rows: Sequence[Mapping[str, Any]], x: str) -> None:
    for number, (name, label) in enumerate(NAMES.items()):
        if name not in TRAINED:
            continue
        for y in ("before", "after"):
            own = [row for row in rows if row["layout"] == name and row[x] is not None and row[y] is not None]
            points = [_mean([row for row in own if row["budget"] == budget], x, y) for budget in _budgets(own)]
            if not points:
                continue
            places, values, lows, highs = zip(*sorted(points), strict=True)
            axes.errorbar(
                places, values, yerr=[lows, highs], color=COLOURS[number], linewidth=1.3, elinewidth=1, markersize=4.5,
                marker="o", markerfacecolor="white" if y == "before" else None,
                linestyle="--" if y == "before" else "-", label=label if y == "before" else None,
            )  # fmt: skip
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_yscale("symlog", linthresh=_LINEAR)
    axes.yaxis.set_major_formatter("{x:.3g}")
    plain(axes, 8)


def _budgets(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return sorted({row["budget"] for row in rows})


def _mean(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[float, float, float, float]:
    """Return means of x and y, and y's reach below and above."""
    values = [row[y] for row in rows]
    mean = statistics.fmean(values)
    return statistics.fmean(row[x] for row in rows), mean, mean - min(values), max(values) - mean


def draw_spans(path: Path, content: Mapping[str, Any], chosen: Sequence[Mapping[float, Path]]) -> None:
    """Draw each head's rule and share.

    A row is a density, a column a model.

    Args:
        chosen: layout files by density, of each model.
    """
    budgets = sorted({budget for files in chosen for budget in files})
    if not budgets:
        return
    sheet = Sheet(0.6 + 5.4 * len(chosen), 1.0 + 4.0 * len(budgets))
    sheet.text(0.45, 0.2, f"{content['model']}: rules chosen by the squared effect, in blocks", size=12, bold=True)
    words = (
        "4: the last 4 blocks;  2+¼: the last 2 and a quarter of all;  4|16: the last 4, and every 16th;  all: dense"
    )
    sheet.text(0.45, 0.5, words, colour=GREY)
    for column, files in enumerate(chosen):
        for row, budget in enumerate(budgets):
            if budget not in files:
                continue
            layers, block_size = read_layers(files[budget])
            length = content["seq_length"]
            shares = {head: kept_share(head, block_size, length) for heads in layers for head in heads}
            kept = np.array([[shares[head] for head in heads] for heads in layers])
            short = [[_short(head) for head in heads] for heads in layers]
            title = f"{Path(content['folders'][column]).name}, density {budget:g}: share that each head keeps"
            draw_heads(sheet, 0.75 + 5.4 * column, 0.85 + 4.0 * row, title, kept, 0, 1, short)
    write_png(sheet.figure, path)


def read_layers(file: Path) -> tuple[list[list[Pattern]], int]:
    """Read each head's pattern by layer, and the block size."""
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    rules = [pattern_of(rule, settings["block_size"]) for rule in settings["pattern"]["rules"]]
    return [[rules[number] for number in row] for row in settings["pattern"]["heads"]], settings["block_size"]


def _short(pattern: Pattern) -> str:
    match pattern:
        case Dense():
            return "all"
        case Span():
            share = {0.125: "⅛", 0.25: "¼", 0.5: "½"}.get(pattern.slope, f"{pattern.slope:g}")
            return f"{pattern.base}" + (f"+{share}" if pattern.slope else "")
        case LocalVertical():
            return f"{pattern.local}|{pattern.stride}"
        case SlidingWindow():
            return f"{pattern.window}"
        case GlobalBlocks():
            return f"{pattern.local}+{len(pattern.blocks)}c"
        case _:
            return pattern.form()
