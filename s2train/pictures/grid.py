"""Draws the layer × head grid."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from s2train.attention.hybrid import HybridLayout
from s2train.costs.attention import kept_positions
from s2train.layouts.patterns import Dense, Pattern
from s2train.pictures.style import DENSE, GREY, form_colours, offset_of, shade

_POINTS_PER_DIGIT = 4.6  # least cell width to write the offset into it


def draw_grid(axes: Axes, hybrid: HybridLayout, seq_length: int) -> None:
    """Draw one cell per head, coloured by pattern, paler if sparser.

    The cell shows the head's offset as a number or, if there is no room, as a bar at its position within the period.
    """
    colours = form_colours(hybrid)
    densities = _densities(hybrid, seq_length)
    image = np.array([[_colour(head, densities[head], colours) for head in layer.heads] for layer in hybrid.layers])
    num_layers, num_heads, _ = image.shape
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(num_heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(2.0, 32 / max(num_layers, num_heads)))
    axes.tick_params(which="minor", length=0)
    axes.tick_params(labelsize=8, length=0, colors=GREY)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set_xlabel("head", fontsize=8.5, color=GREY)
    axes.set_ylabel("layer", fontsize=8.5, color=GREY)
    _mark_offsets(axes, hybrid, image)
    _legend(axes, hybrid, densities, colours)


def _densities(hybrid: HybridLayout, seq_length: int) -> dict[Pattern, float]:
    causal = seq_length * (seq_length + 1) // 2
    return {
        head: kept / causal
        for layer in set(hybrid.layers)
        for head, kept in zip(layer.heads, kept_positions(layer, seq_length), strict=True)
    }


def _colour(head: Pattern, density: float, colours: dict[str, str]) -> tuple[float, float, float]:
    return to_rgb(DENSE) if isinstance(head, Dense) else shade(colours[head.form()], density)


def _mark_offsets(axes: Axes, hybrid: HybridLayout, image: np.ndarray) -> None:
    num_layers, num_heads, _ = image.shape
    box = axes.get_window_extent()
    points = 72 / axes.figure.dpi
    width, height = box.width * points / num_heads, box.height * points / num_layers
    offsets = [[offset_of(head) for head in layer.heads] for layer in hybrid.layers]
    digits = max((len(str(offset)) for row in offsets for offset in row if offset is not None), default=1)
    size = min(8.0, width / digits / 0.72, height * 0.62)
    bars: dict[str, list[tuple[float, int]]] = {}  # places by colour: deep models have too many for a plot each
    for row, layer in enumerate(hybrid.layers):
        for column, head in enumerate(layer.heads):
            offset = offsets[row][column]
            if offset is None:
                continue
            colour = "#1B2A3A" if image[row, column].mean() > 0.6 else "white"
            if width >= _POINTS_PER_DIGIT * digits and height >= 7:
                axes.text(column, row, str(offset), ha="center", va="center_baseline", fontsize=size, color=colour)
            elif head.period > 1:
                x = column - 0.4 + 0.8 * (offset + 0.5) / head.period
                bars.setdefault(colour, []).append((x, row))
    for colour, places in bars.items():
        x, y = np.array(places).T
        axes.vlines(x, y - 0.36, y + 0.36, color=colour, linewidth=0.7, capstyle="projecting")


def _legend(axes: Axes, hybrid: HybridLayout, densities: dict[Pattern, float], colours: dict[str, str]) -> None:
    of_form: dict[str, list[float]] = {}
    for layer in hybrid.layers:
        for head in layer.heads:
            of_form.setdefault("dense" if isinstance(head, Dense) else head.form(), []).append(densities[head])
    patches = []
    for form, values in of_form.items():
        mean = sum(values) / len(values)
        colour = to_rgb(DENSE) if form == "dense" else shade(colours[form], mean)
        words = form if form == "dense" else f"{form}: density {mean:.3f}"
        patches.append(Patch(color=colour, label=words))
    axes.legend(
        handles=patches[:5], loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, fontsize=8, ncols=1,
        handlelength=1.1, handleheight=1.0, borderpad=0.1, labelspacing=0.3,
    )  # fmt: skip
