"""Draws held-out loss against throughput, a panel per phase."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

from s2train.pictures.png import write_png
from s2train.study.comparison import BASELINE, Group
from s2train.study.picture import variant_colours
from s2train.study.variants import PHASES

_WIDTH, _HEIGHT = 6.5, 4.5  # of a panel, in inches
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.85, 0.2, 0.6, 0.35  # its margins
_NEAR = 7  # points between a point and its label
_DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))  # tried in this order
_MARKER, _CAP = 4, 4  # half a marker and half a bar's cap, in points


def with_speed(grouped: Mapping[str, Sequence[Group]]) -> dict[str, list[Group]]:
    """Return the groups whose throughput is known, by phase.

    Phases without one are left out.
    """
    known = {phase: [group for group in own if group.tokens_per_s is not None] for phase, own in grouped.items()}
    return {phase: own for phase, own in known.items() if own}


def draw_by_speed(grouped: Mapping[str, Sequence[Group]], out: Path) -> None:
    """Draw all phases that have a throughput as a PNG."""
    known, colours = with_speed(grouped), variant_colours(grouped)
    count = len(known)
    figure = Figure(figsize=(_WIDTH * count, _HEIGHT), dpi=150)
    canvas = FigureCanvasAgg(figure)
    for number, (phase, own) in enumerate(known.items()):
        left, width = (number * _WIDTH + _LEFT) / (_WIDTH * count), (_WIDTH - _LEFT - _RIGHT) / (_WIDTH * count)
        axes = figure.add_axes((left, _BOTTOM / _HEIGHT, width, (_HEIGHT - _BOTTOM - _TOP) / _HEIGHT))
        axes.set_title(PHASES[phase].title, loc="left")
        draw_phase(axes, own, colours, canvas.get_renderer())
    write_png(figure, out)


def draw_phase(axes: Axes, own: Sequence[Group], colours: Mapping[str, str], renderer: RendererBase) -> None:
    """Draw each variant's mean loss over its throughput.

    A bar spans the seeds. Points of one seed are hollow. Dense is a square, with a line at its loss.
    """
    for group in own:
        (speed, middle), colour = _point(group), colours[group.variant]
        bar = [[middle - min(group.losses)], [max(group.losses) - middle]] if len(group.losses) > 1 else None
        shape, filling = "s" if group.variant == BASELINE else "o", colour if bar else "white"
        axes.errorbar([speed], [middle], yerr=bar, fmt=shape, capsize=_CAP, color=colour, mfc=filling, ms=2 * _MARKER)
        if group.variant == BASELINE:
            axes.axhline(middle, color=colour, linestyle=":", linewidth=1, zorder=0)
    axes.set_xlabel("Training tokens/s per GPU")
    axes.set_ylabel("Held-out loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.2)
    axes.autoscale_view()
    _label_points(axes, own, colours, renderer)


def _label_points(axes: Axes, own: Sequence[Group], colours: Mapping[str, str], renderer: RendererBase) -> None:
    """Name the points without overlap.

    No name covers another, a bar or dense's line. A name that has to stand apart is joined to its point by a line.
    """
    taken = [box for group in own for box in _drawn(axes, group)]
    for group in own:
        label = axes.annotate(
            group.variant,
            _point(group),
            xytext=(0, 0),
            textcoords="offset points",
            color=colours[group.variant],
            fontweight="bold" if group.variant == BASELINE else "normal",
            arrowprops={"arrowstyle": "-", "color": colours[group.variant], "linewidth": 0.6, "shrinkB": _MARKER},
        )
        own_place = next(place for place in _places(axes, label, renderer) if not _overlaps(place, taken))
        assert label.arrow_patch is not None
        label.arrow_patch.set_visible(math.hypot(*label.get_position()) > 2 * _NEAR)
        taken.append(own_place)


def _places(axes: Axes, label: Annotation, renderer: RendererBase) -> Iterator[Bbox]:
    """Move a label to places farther and farther from its point."""
    panel = axes.bbox
    rings = 72 * max(_WIDTH, _HEIGHT) / _NEAR  # within the panel; without a free place there, names may leave it
    for ring in itertools.count(1):
        for right, up in _DIRECTIONS:
            label.set_horizontalalignment("left" if right > 0 else "right" if right else "center")
            label.set_verticalalignment("bottom" if up > 0 else "top" if up else "center")
            label.set_position((_NEAR * ring * right, _NEAR * ring * up))
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without the line
            if ring > rings or (panel.contains(box.x0, box.y0) and panel.contains(box.x1, box.y1)):
                yield box


def _drawn(axes: Axes, group: Group) -> list[Bbox]:
    """Places in pixels of what `draw_phase` draws."""
    speed, middle = _point(group)
    (x, low), (_, high), (_, level) = axes.transData.transform(
        [(speed, min(group.losses)), (speed, max(group.losses)), (speed, middle)]
    )
    figure = axes.get_figure(root=True)
    assert figure is not None
    around = (max(_MARKER, _CAP) + 1) * figure.dpi / 72
    places = [Bbox.from_extents(x - around, low - around, x + around, high + around)]
    if group.variant == BASELINE:
        places.append(Bbox.from_extents(axes.bbox.x0, level - 1, axes.bbox.x1, level + 1))
    return places


def _overlaps(place: Bbox, taken: Sequence[Bbox]) -> bool:
    return any(place.overlaps(other) for other in taken)


def _point(group: Group) -> tuple[float, float]:
    assert group.tokens_per_s is not None
    return group.tokens_per_s, mean(group.losses)
