"""Draws loss and speed of runs against attention density."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from s2train.pictures.png import write_png
from s2train.pictures.style import CURVES

_MARKERS = "osD^"
_MOST_NAMES = len(CURVES) * len(_MARKERS)  # distinguishable names


@dataclass(frozen=True)
class Point:
    """A finished run.

    Attributes:
        name: runs with the same name are repetitions, such as other seeds.
        density: kept / causal positions of the whole model.
        loss: nats per token.
        tokens_per_s: throughput of the whole job.
        is_held_out: whether the loss is a held-out loss.
    """

    name: str
    density: float
    loss: float
    tokens_per_s: float
    is_held_out: bool


def draw(points: Sequence[Point], out: Path) -> None:
    """Draw loss and tokens/s against density in two panels, as a PNG.

    Runs are faint, the mean of each name is bold. Too many names to distinguish get one colour and no legend.
    """
    names = list(dict.fromkeys(point.name for point in points))
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    if all(point.is_held_out for point in points):
        title = "Held-out loss"
    else:
        title = "Loss, held out where measured" if any(point.is_held_out for point in points) else "Training loss"
    _panel(left, points, names, lambda point: point.loss, f"{title} (nats per token)")
    _panel(right, points, names, lambda point: point.tokens_per_s, "Tokens/s")
    right.yaxis.set_major_formatter(EngFormatter(sep=""))
    right.set_ylim(0, 1.08 * max(point.tokens_per_s for point in points))
    if len(names) <= _MOST_NAMES:
        handles, labels = left.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside right center", frameon=False, fontsize=8, title="large: mean of its runs"
        )
    write_png(figure, out)


def _panel(
    axes: Axes, points: Sequence[Point], names: Sequence[str], value: Callable[[Point], float], title: str
) -> None:
    for number, name in enumerate(names):
        own = [point for point in points if point.name == name]
        style = number if len(names) <= _MOST_NAMES else 0
        colour, marker = CURVES[style % len(CURVES)], _MARKERS[style // len(CURVES)]
        if len(own) > 1:
            axes.scatter(
                [p.density for p in own], [value(p) for p in own], s=18, color=colour, alpha=0.4, marker=marker
            )
        middle = mean(p.density for p in own), mean(value(p) for p in own)
        axes.scatter(*middle, s=60, color=colour, marker=marker, label=name, zorder=3)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.set_xlabel("density of attention (kept / causal positions)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
