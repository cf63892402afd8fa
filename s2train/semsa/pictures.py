"""Pictures of choices, verifications and frontiers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from s2train.attention.hybrid import HybridLayout
from s2train.costs.attention import kept_positions
from s2train.kernels.block_statistics.effects import SUMS
from s2train.pictures.png import write_png
from s2train.pictures.style import GREY, SPARSE, Sheet, plain
from s2train.semsa.profile import Profile

COLOURS = (*SPARSE, "#D55E00", "#999999", "#2E3440")


def draw_choice(path: Path, profile: Profile, hybrid: HybridLayout, seq_length: int) -> None:
    """Draw each head's share of positions, and how much each head matters."""
    sheet = Sheet(11.0, 4.6)
    sheet.text(0.45, 0.2, f"{profile.model.name}: chosen for {profile.about['checkpoint']}", size=12, bold=True)
    sheet.text(0.45, 0.5, f"{seq_length:,} tokens in blocks of {profile.block_size}", colour=GREY)
    causal = seq_length * (seq_length + 1) // 2
    shares = np.array([kept_positions(layer, seq_length) for layer in hybrid.layers]) / causal
    draw_heads(sheet, 0.75, 0.85, f"share that each head keeps: {shares.mean():.3f} on average", shares, 0, 1)
    squared = profile.blocks[SUMS.index("squared")].astype(np.float64)
    far = np.tri(squared.shape[-1], k=-1, dtype=bool)
    matters = np.log10((squared * far).sum((2, 3)) / profile.tokens / 2 + 1e-12)
    title = "effect of its far blocks, log10 of nats per token"
    draw_heads(sheet, 6.15, 0.85, title, matters, matters.min(), matters.max())
    write_png(sheet.figure, path)


def draw_heads(
    sheet: Sheet,
    left: float,
    top: float,
    title: str,
    values: np.ndarray,
    low: float,
    high: float,
    words: Sequence[Sequence[str]] = (),
) -> None:
    """Draw a value, and a word if given, for each head."""
    sheet.text(left, top, title, size=9.5, bold=True)
    axes = sheet.axes(left, top + 0.3, 3.9, 3.0)
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=low, vmax=high, interpolation="nearest")
    for layer, row in enumerate(words):
        for head, word in enumerate(row):
            colour = "white" if values[layer, head] > (low + high) / 2 else "black"
            axes.text(head, layer, word, ha="center", va="center", fontsize=5.5, color=colour)
    axes.set_xlabel("head", fontsize=8, color=GREY)
    axes.set_ylabel("layer", fontsize=8, color=GREY)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    plain(axes, 8)
    bar = sheet.figure.colorbar(image, cax=sheet.axes(left + 4.0, top + 0.3, 0.12, 3.0))
    bar.ax.tick_params(labelsize=7, length=2, colors=GREY)


def curve(
    axes: Axes, rows: Sequence[Mapping[str, float]], x: str, y: str, name: str, number: int, style: str = "o-"
) -> None:
    """Draw one named curve of rows, in order of x."""
    ordered = sorted(rows, key=lambda row: row[x])
    points = [row[x] for row in ordered], [row[y] for row in ordered]
    axes.plot(*points, style, color=COLOURS[number % len(COLOURS)], markersize=3.5, linewidth=1.4, label=name)
