"""Draws perplexity and error against the number of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from s2train.pictures.png import write_png
from s2train.pictures.style import CURVES

_STYLES = ("-", "--", ":")  # of curves whose colours repeat


@dataclass(frozen=True)
class Panel:
    """One panel of named curves.

    A curve maps abscissae to ordinates. The abscissa's axis is logarithmic.
    """

    title: str
    abscissa: str
    ordinate: str
    curves: Mapping[str, Mapping[int, float]]
    scale: str = "log"  # of the ordinate; or linear


def draw_curves(
    panels: Sequence[Panel],
    path: Path,
    *,
    level: float | None = None,
) -> None:
    """Draw the panels side by side as a PNG.

    Args:
        level: a horizontal line in the first panel, of the unchanged model.
    """
    figure = Figure(figsize=(6 * len(panels), 4.2), dpi=150, layout="constrained")
    for number, panel in enumerate(panels):
        axes: Axes = figure.add_subplot(1, len(panels), number + 1)
        for place, (name, curve) in enumerate(panel.curves.items()):
            repeat, hue = divmod(place, len(CURVES))
            style = _STYLES[repeat % len(_STYLES)]
            points = list(curve), list(curve.values())
            axes.plot(*points, style, marker="o", markersize=4, color=CURVES[hue], label=name)
        if level is not None and number == 0:
            axes.axhline(level, color="#777777", linestyle="--", linewidth=1.2, label="unchanged")
        axes.set_xscale("log", base=2)
        axes.set_yscale(panel.scale)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(panel.abscissa)
        axes.set_ylabel(panel.ordinate)
        axes.grid(color="#E5E5E5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    write_png(figure, path)
