"""Draws loss curves from `metrics.jsonl`."""

import math
from collections.abc import Mapping
from functools import partial
from itertools import cycle
from operator import mul
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from s2train.pictures.line_ends import End, label_ends
from s2train.pictures.png import write_png
from s2train.pictures.style import CURVES
from s2train.training.records import Curves, read_curves

GREY = "#777777"


def draw_loss_curve(metrics: Path, out: Path, baseline: float | None = None, title: str = "Training loss") -> None:
    """Draw train and held-out loss of one run, as a PNG.

    Args:
        baseline: unigram entropy of the corpus in nats per token, the best loss without any context.
    """
    curves = read_curves(metrics)
    figure, axes = _new_figure(title)
    axes.plot(*_points(curves.train), color=CURVES[0], alpha=0.6, linewidth=1.2)
    axes.plot(*_points(curves.held_out), color=CURVES[1], linewidth=2.2, marker="o", markersize=3.5)
    ends = _end("train", curves.train, CURVES[0]) + _end("held out", curves.held_out, CURVES[1])
    if baseline is not None:
        axes.axhline(baseline, color=GREY, linestyle="--", linewidth=1.2)
        ends.append(End(f"unigram entropy {baseline:.3f}", baseline, GREY))
    for step in curves.resumed:
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1)
        what = " resumed, held-out text changed" if step in curves.other_held_out else " resumed"
        axes.text(step, 0.98, what, transform=axes.get_xaxis_transform(), va="top", fontsize=8, color=GREY)
    axes.set_xlabel("step")
    _finish(axes, [curves], ends, baseline)
    write_png(figure, out)


def draw_comparison(runs: Mapping[str, Path], out: Path) -> None:
    """Draw the losses of several runs over their steps in one PNG.

    Train losses are thin, held-out losses bold, and each run has a colour. If all runs have the same tokens per step,
    a second axis at the top gives tokens.

    Args:
        runs: name of each run and its metrics.jsonl; colours repeat after six.

    Raises:
        ConfigError: a file is missing.
    """
    curves = {name: read_curves(metrics) for name, metrics in runs.items()}
    figure, axes = _new_figure("Loss: train (thin), held out (bold)")
    ends: list[End] = []
    for (name, run), colour in zip(curves.items(), cycle(CURVES), strict=False):
        axes.plot(*_points(run.train), color=colour, alpha=0.45, linewidth=0.9)
        axes.plot(*_points(run.held_out), color=colour, linewidth=2.4)
        ends += _end(name, run.held_out or run.train, colour)
    per_step = {run.tokens_per_step for run in curves.values()}
    common = next(iter(per_step)) if len(per_step) == 1 else None
    axes.set_xlabel("step")
    if common is not None:
        top = axes.secondary_xaxis("top", functions=(partial(mul, common), partial(mul, 1 / common)))
        top.xaxis.set_major_formatter(EngFormatter(sep=""))
        top.set_xlabel("tokens", color=GREY)
        top.tick_params(colors=GREY)
        top.spines[:].set_visible(False)
    _finish(axes, list(curves.values()), ends, None)
    write_png(figure, out)


def _end(name: str, losses: Mapping[int, float], colour: str) -> list[End]:
    """Label of one line; none if it has no finite loss."""
    finite = [step for step, loss in losses.items() if math.isfinite(loss)]
    last = losses[max(finite)] if finite else math.nan
    return [End(f"{name} {last:.3f}", last, colour)] if finite else []


def _points(losses: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


def _new_figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontweight="bold", fontsize=12)
    axes.set_ylabel("loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _finish(axes: Axes, curves: list[Curves], ends: list[End], baseline: float | None) -> None:
    """Set the loss axis, and label each line at its right end.

    The first losses are far above the rest, so the axis cuts off the highest 3 %.
    """
    losses = sorted(v for run in curves for d in (run.train, run.held_out) for v in d.values() if math.isfinite(v))
    if losses:
        top = max(losses[math.ceil(0.97 * (len(losses) - 1))], *(end.value for end in ends), baseline or 0)
        low = min(losses[0], baseline or losses[0])
        margin = 0.06 * (top - low) or 0.1
        axes.set_ylim(low - margin, top + margin)
        axes.set_xlim(left=0)
    else:
        axes.text(0.5, 0.5, "no loss logged yet", transform=axes.transAxes, ha="center", color=GREY)
    label_ends(axes, ends, 0.055, fontsize=9, fontweight="bold")
