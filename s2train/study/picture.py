"""Draws held-out loss against tokens/s, a panel per phase."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from s2train.files import replacing
from s2train.study.comparison import Group
from s2train.study.variants import PHASES
from s2train.training.plots import COLOURS


def draw(grouped: Mapping[str, Sequence[Group]], out: Path) -> None:
    """Draw the mean loss of each variant as a PNG.

    A bar spans its lowest to its highest seed.
    """
    figure = Figure(figsize=(5.5 * len(grouped), 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(group.variant for own in grouped.values() for group in own))
    for axes, (phase, own) in zip(figure.subplots(1, len(grouped), squeeze=False)[0], grouped.items(), strict=True):
        for group in own:
            colour = COLOURS[names.index(group.variant) % len(COLOURS)]
            middle = sum(group.losses) / len(group.losses)
            bar = [[middle - min(group.losses)], [max(group.losses) - middle]]
            axes.errorbar([group.tokens_per_s], [middle], yerr=bar, fmt="o", capsize=4, color=colour)
            axes.annotate(
                group.variant, (group.tokens_per_s, middle), xytext=(6, 4), textcoords="offset points", color=colour
            )
        axes.set_title(f"{PHASES[phase].length:,} tokens", loc="left")
        axes.set_xlabel("Tokens/s per GPU")
        axes.set_ylabel("Held-out loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(0.2)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png")
