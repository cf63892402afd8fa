"""A picture of a layout: every head of every layer, and what the heads of a sparse layer see."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from s2train.layouts.costs import density
from s2train.layouts.coverage import coverage_report, percent
from s2train.layouts.hybrid import HybridLayout, LayerLayout
from s2train.layouts.patterns import LocalVertical

DENSE_COLOUR = "#3b4252"
UNSEEN_COLOUR = "#d1495b"  # of blocks that no head of the layer keeps
_KEPT = "#2f6f9f"
_DROPPED = "#f2f2ef"
# Masks show the first blocks alone, or no column could be told from the next: this many, or more where the
# window and three strides need them.
_SHOWN_BLOCKS = 64


def draw_layer_head_grid(hybrid: HybridLayout, seq_length: int, path: Path) -> None:
    """Write a PNG: the layer × head grid, and beside it what the heads of the first sparse layer keep.

    Sparse heads are coloured by offset, others are dark. Density and coverage hold at `seq_length` tokens.
    """
    sparse = next((number for number, layer in enumerate(hybrid.layers) if not layer.is_dense), None)
    figure = Figure(figsize=(11, 5.4) if sparse is not None else (6, 5.4), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(hybrid, seq_length), fontsize=11, y=0.975)
    if sparse is None:
        _draw_grid(figure, hybrid)
    else:
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))[0]
        _draw_grid(left, hybrid)
        _draw_masks(right, hybrid.layers[sparse], sparse, seq_length)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _title(hybrid: HybridLayout, seq_length: int) -> str:
    num_layers, num_heads = len(hybrid.layers), len(hybrid.layers[0].heads)
    title = (
        f"{num_layers} layers × {num_heads} heads, {seq_length:,} tokens in blocks of {hybrid.block_size}: "
        f"density {percent(density(hybrid, seq_length))}"
    )
    runs = coverage_report(hybrid, seq_length).runs
    if not runs:
        return title
    layer = min(covered.fraction for run in runs for covered in run.layers)
    run = min(run.union.fraction for run in runs)
    of_run = f", {percent(run)} per run" if run > layer else ""
    return f"{title}, coverage {percent(layer)} per layer{of_run}"


def _draw_grid(figure: Figure | SubFigure, hybrid: HybridLayout) -> None:
    offsets = np.array(
        [[head.offset if isinstance(head, LocalVertical) else -1 for head in layer.heads] for layer in hybrid.layers]
    )
    strides = {head.stride for layer in hybrid.layers for head in layer.heads if isinstance(head, LocalVertical)}
    stride = max(strides, default=1)
    colours = ListedColormap(colormaps["viridis"](np.linspace(0.08, 1, stride)))
    axes = figure.add_axes((0.12, 0.13, 0.72, 0.74))
    axes.set_facecolor(DENSE_COLOUR)
    image = axes.imshow(
        np.ma.masked_less(offsets, 0),
        cmap=colours,
        norm=BoundaryNorm(np.arange(stride + 1) - 0.5, stride),
        aspect="auto",
        interpolation="nearest",
    )
    num_layers, num_heads = offsets.shape
    # Lines between the cells, thin where there are many.
    axes.set_xticks(np.arange(num_heads + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.5, 16 / max(num_layers, num_heads)))
    axes.tick_params(which="minor", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.set(xlabel="head", ylabel="layer")
    if strides:
        bar = figure.colorbar(image, cax=figure.add_axes((0.87, 0.13, 0.03, 0.74)))
        bar.set_label("offset of the head's columns (blocks)")
        bar.ax.yaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        bar.ax.minorticks_off()
    names = dict.fromkeys(
        layer.kind.name for layer in hybrid.layers if not all(isinstance(head, LocalVertical) for head in layer.heads)
    )
    if names:
        patch = Patch(color=DENSE_COLOUR, label=", ".join(names))
        axes.legend(handles=[patch], loc="lower left", bbox_to_anchor=(0, 1), frameon=False, borderpad=0.2)


def _draw_masks(figure: Figure | SubFigure, layer: LayerLayout, number: int, seq_length: int) -> None:
    reach = max((head.local + 3 * head.stride for head in layer.heads if isinstance(head, LocalVertical)), default=0)
    shown = min(layer.num_blocks(seq_length), max(_SHOWN_BLOCKS, reach))
    blocks = torch.arange(shown)
    num_heads = len(layer.heads)
    masks = np.stack([head.keep(blocks[:, None], blocks[None, :]).numpy() for head in layer.heads])
    future = ~np.tri(shown, dtype=bool)
    distinct = [layer.heads.index(pattern) for pattern in dict.fromkeys(layer.heads)]
    chosen = [distinct[place * len(distinct) // 3] for place in range(3)] if len(distinct) > 3 else distinct
    grid = figure.add_gridspec(2, 2, left=0.1, right=0.9, bottom=0.09, top=0.84, hspace=0.36, wspace=0.32)
    figure.text(0.5, 0.9, f"layer {number}: blocks kept, first {shown} × {shown}", ha="center", fontsize=10)
    for place, head in enumerate(chosen):
        axes = figure.add_subplot(grid[place // 2, place % 2])
        axes.imshow(
            np.ma.masked_where(future, masks[head]),
            cmap=ListedColormap([_DROPPED, _KEPT]),
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        pattern = layer.heads[head]
        offset = f", offset {pattern.offset}" if isinstance(pattern, LocalVertical) else ""
        _label(axes, f"head {head}{offset}")
    _draw_counts(figure.add_subplot(grid[1, 1]), masks.sum(0), num_heads)


def _draw_counts(axes: Axes, counts: np.ndarray, num_heads: int) -> None:
    """How many heads keep each block; `counts` is int [n, n]."""
    future = ~np.tri(len(counts), dtype=bool)
    unseen = (counts == 0) & ~future
    axes.imshow(np.ma.masked_where(~unseen, unseen), cmap=ListedColormap([UNSEEN_COLOUR]), interpolation="nearest")
    image = axes.imshow(
        np.ma.masked_less(counts, 1),
        cmap=ListedColormap(colormaps["Blues"](np.linspace(0.25, 1, 256))),
        norm=LogNorm(1, max(2, num_heads)),  # a far block has few heads beside the window's
        interpolation="nearest",
    )
    _label(axes, "heads per block" + (" (red: none)" if unseen.any() else ""))
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.04, 0, 0.05, 1)))
    ticks = [1, *(num_heads // part for part in (8, 4, 2, 1) if num_heads // part > 1)]
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], fontsize=7)
    bar.ax.minorticks_off()


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("key block", fontsize=7, labelpad=2)
    axes.set_ylabel("query block", fontsize=7, labelpad=2)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
