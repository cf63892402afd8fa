"""Draws held-out losses, a panel per phase."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator, StrMethodFormatter

from s2train.files import replacing
from s2train.pictures.style import CURVES
from s2train.study.comparison import Group
from s2train.study.variants import PHASES
from s2train.training.plots import GREY

BASELINE = "dense"  # whose losses others are compared with by position
_COLOURS = (*CURVES, "#000000")
_APART = 0.03  # octaves

Panel = Callable[[Axes, Sequence[Group], Mapping[str, str]], None]  # draws groups in colours by variant


def draw(grouped: Mapping[str, Sequence[Group]], out: Path) -> None:
    """Draw all phases as a PNG.

    A panel shows loss against tokens/s if all variants of the phase have a speed. Another one shows loss by position
    if a speed is missing, or was measured apart from the runs.
    """
    panels = [(phase, own, draw_panel) for phase, own in grouped.items() for draw_panel in _panels(own)]
    figure = Figure(figsize=(6.5 * len(panels), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = dict.fromkeys(group.variant for own in grouped.values() for group in own if group.variant != BASELINE)
    colours = {BASELINE: GREY, **dict(zip(names, cycle(_COLOURS), strict=False))}
    for axes, (phase, own, draw_panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, own, colours)
        axes.set_title(PHASES[phase].title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")


def _panels(own: Sequence[Group]) -> list[Panel]:
    """Return how a phase is drawn."""
    is_known = all(group.tokens_per_s is not None for group in own)
    is_of_runs = all(group.timed for group in own)
    return [
        *([_draw_by_speed] if is_known else []),
        *([] if is_known and is_of_runs else [_draw_by_position]),
    ]


def _draw_by_speed(axes: Axes, own: Sequence[Group], colours: Mapping[str, str]) -> None:
    """Draw the mean loss of each variant over its speed.

    A bar spans the lowest to the highest seed.
    """
    for group in own:
        colour, speed = colours[group.variant], group.tokens_per_s
        assert speed is not None
        middle = mean(group.losses)
        bar = [[middle - min(group.losses)], [max(group.losses) - middle]]
        axes.errorbar([speed], [middle], yerr=bar, fmt="o", capsize=4, color=colour)
        axes.annotate(group.variant, (speed, middle), xytext=(6, 4), textcoords="offset points", color=colour)
    axes.set_xlabel("Tokens/s per GPU")
    axes.set_ylabel("Held-out loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.margins(0.2)


def _draw_by_position(axes: Axes, own: Sequence[Group], colours: Mapping[str, str]) -> None:
    """Draw each variant's loss by position.

    The mean of dense runs is subtracted if there are any. Bars span the seeds; those of dense are the band around zero.
    Labels have the mean loss over all positions.
    """
    baseline = next(
        ({stop: mean(losses) for stop, losses in _losses(group)} for group in own if group.variant == BASELINE), None
    )
    ends: list[tuple[float, str, str]] = []
    for number, group in enumerate(own):
        colour = colours[group.variant]
        points = [
            (stop, [loss - (baseline[stop] if baseline else 0) for loss in losses])
            for stop, losses in _losses(group)
            if baseline is None or stop in baseline
        ]
        if not points:
            continue
        low, high = ([pick(losses) for _, losses in points] for pick in (min, max))
        middles = [mean(losses) for _, losses in points]
        stops = [stop for stop, _ in points]
        if baseline and group.variant == BASELINE:
            axes.axhline(0, color=GREY, linewidth=1.5)
            axes.fill_between(stops, low, high, color=GREY, alpha=0.2, linewidth=0)
        else:
            apart = 2 ** (_APART * (number - len(own) / 2))  # bars of variants stand side by side
            bars = [np.subtract(middles, low), np.subtract(high, middles)]
            places = [stop * apart for stop in stops]
            axes.errorbar(places, middles, yerr=bars, color=colour, marker="o", markersize=3.5, elinewidth=0.9)
        ends.append((middles[-1], f"{group.variant} {mean(group.losses):.3f}", colour))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({stop for group in own for stop, _ in _losses(group)})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("Position in the sequence, up to")
    axes.set_ylabel(f"Held-out loss{' less dense’s' if baseline else ''} (nats per token)")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    _label(axes, ends)


def _losses(group: Group) -> list[tuple[int, list[float]]]:
    """Return losses of all seeds by range of positions.

    A range is named by its end, and left out where a seed has no loss.
    """
    rows = []
    for parts in zip(*(result.by_position for result in group.results), strict=True):
        losses = [loss for _, _, loss in parts if loss is not None]
        if len(losses) == len(parts):
            rows.append((parts[0][1], losses))
    return rows


def _label(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's label right of its end, without overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.06 * (top - bottom)
    height = bottom - gap
    for value, text, colour in sorted(ends):
        height = max(value, height + gap)
        axes.annotate(
            text,
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
