"""Draws held-out loss by position, a panel per phase."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from s2train.pictures.line_ends import End, label_ends
from s2train.pictures.png import write_png
from s2train.pictures.style import CURVES
from s2train.study.comparison import BASELINE, Group, find_baseline
from s2train.study.results import Result
from s2train.study.variants import PHASES
from s2train.training.plots import GREY

_COLOURS = (*CURVES, "#000000")
_APART = 0.03  # octaves


def variant_colours(grouped: Mapping[str, Sequence[Group]]) -> dict[str, str]:
    """Return a colour for each variant of all phases."""
    names = dict.fromkeys(group.variant for own in grouped.values() for group in own if group.variant != BASELINE)
    return {BASELINE: GREY, **dict(zip(names, cycle(_COLOURS), strict=False))}


def draw_by_position(grouped: Mapping[str, Sequence[Group]], out: Path) -> None:
    """Draw all phases as a PNG."""
    figure, colours = Figure(figsize=(6.5 * len(grouped), 4.5), dpi=150, layout="constrained"), variant_colours(grouped)
    panels = figure.subplots(1, len(grouped), squeeze=False)[0]
    for axes, (phase, own) in zip(panels, grouped.items(), strict=True):
        _draw_phase(axes, own, colours)
        axes.set_title(PHASES[phase].title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    write_png(figure, out)


def _draw_phase(axes: Axes, own: Sequence[Group], colours: Mapping[str, str]) -> None:
    """Draw each variant's loss by position.

    The loss of the dense run of the same seed is subtracted if there are dense runs. Bars span the seeds. Labels have
    the mean over all positions and seeds: of dense the loss, of others what is drawn.
    """
    baseline = find_baseline(own)
    ends: list[End] = []
    for number, group in enumerate(own):
        colour, losses = colours[group.variant], _losses(group, baseline)
        if group is baseline:
            axes.axhline(0, color=GREY, linewidth=1.5)
            ends.append(End(f"{group.variant} {mean(group.losses):.3f}", 0.0, colour))
        elif losses:
            low, high, middles = ([pick(seeds) for seeds in losses.values()] for pick in (min, max, mean))
            apart = 2 ** (_APART * (number - len(own) / 2))  # bars of variants stand side by side
            bars = [np.subtract(middles, low), np.subtract(high, middles)]
            places = [stop * apart for stop in losses]
            axes.errorbar(places, middles, yerr=bars, color=colour, marker="o", markersize=3.5, elinewidth=0.9)
            ends.append(End(f"{group.variant} {_mean_loss(group, baseline)}", middles[-1], colour))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted({stop for group in own for stop in _losses(group, None)})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_xlabel("Position in the sequence, up to")
    axes.set_ylabel(f"Held-out loss{' less dense’s' if baseline else ''} (nats per token)")
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    label_ends(axes, ends, 0.06)


def _mean_loss(group: Group, baseline: Group | None) -> str:
    if baseline is None:
        return f"{mean(group.losses):.3f}"
    return f"{mean(own.loss - dense.loss for own, dense in group.paired(baseline)):+.3f}"


def _losses(group: Group, baseline: Group | None) -> dict[int, list[float]]:
    """Return losses by range of positions.

    The baseline's of the same seed are subtracted. A range is named by its end, and left out where a seed has no loss.
    """
    curves = [_by_end(result) for result in group.results]
    if baseline is not None:
        pairs = [(_by_end(result), _by_end(dense)) for result, dense in group.paired(baseline)]
        curves = [{stop: own[stop] - dense[stop] for stop in own if stop in dense} for own, dense in pairs]
    shared = [stop for stop in (curves[0] if curves else ()) if all(stop in curve for curve in curves)]
    return {stop: [curve[stop] for curve in curves] for stop in shared}


def _by_end(result: Result) -> dict[int, float]:
    return {stop: loss for _, stop, loss in result.by_position if loss is not None}
