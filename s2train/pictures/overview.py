"""Draws an overview of a model's layout in one picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from s2train.attention.coverage import coverage_report, percent, union_coverage
from s2train.attention.hybrid import HybridLayout
from s2train.attention.reachability import NEVER, reach
from s2train.costs.attention import density
from s2train.costs.kv_cache import model_cache_tokens
from s2train.errors import ConfigError
from s2train.layouts.patterns import known_blocks
from s2train.pictures.blocks import LONGEST, draw_counts, draw_heads, draw_union, first_blocks, reduce_masks
from s2train.pictures.grid import draw_grid
from s2train.pictures.png import write_png
from s2train.pictures.style import GREY, REACHED, SPARSE, Sheet, form_colours, offset_of, plain, tokens

WIDTH = 11.0  # inches
_TOP, _ROW, _MARGIN = 6.05, 2.85, 0.05
_MOST_ROWS = 3  # layers drawn by default
_BINS = 125  # across the receptive field


def choose_layers(hybrid: HybridLayout, layers: Sequence[int] | None) -> list[int]:
    """Return the layers to draw.

    Returns those given, or the first of each distinct sparse layer, at most three.

    Raises:
        ConfigError: the model has no such layer.
    """
    if layers is not None:
        for number in layers:
            if not 0 <= number < len(hybrid.layers):
                last = len(hybrid.layers) - 1
                raise ConfigError(
                    "layers", list(layers), f"the model has no layer {number}", f"Name layers 0 to {last}."
                )
        return list(layers)
    first = {layer: hybrid.layers.index(layer) for layer in dict.fromkeys(hybrid.layers) if not layer.is_dense}
    return sorted(first.values())[:_MOST_ROWS]


def draw_layout(
    hybrid: HybridLayout, seq_length: int, path: Path, layers: Sequence[int] | None = None, title: str = ""
) -> None:
    """Write a PNG of grid, receptive field, costs and block masks.

    Args:
        layers: layers whose masks to draw (`choose_layers`).
        title: the model's name.
    Raises:
        ConfigError: the model has no such layer.
    """
    chosen = choose_layers(hybrid, layers)
    sheet = Sheet(WIDTH, _TOP + _ROW * len(chosen) + _MARGIN)
    num_heads = len(hybrid.layers[0].heads)
    name = f"{title}: " if title else ""
    sheet.text(0.45, 0.2, f"{name}{len(hybrid.layers)} layers × {num_heads} heads", size=14, bold=True)
    sheet.text(0.45, 0.52, _subtitle(hybrid, seq_length), size=9, colour=GREY)
    draw_grid(sheet.axes(0.75, 1.45, 5.55, 4.0), hybrid, seq_length)
    sheet.text(7.0, 0.98, "Positions that reach the last one", size=9.5, bold=True)
    _draw_field(sheet.axes(7.3, 1.25, 3.35, 1.72), hybrid, seq_length)
    sheet.text(7.0, 3.52, "Cost relative to a dense model", size=9.5, bold=True)
    _draw_shares(sheet.axes(7.3, 3.8, 3.35, 1.65), hybrid, seq_length)
    for row, number in enumerate(chosen):
        _draw_layer(sheet, _TOP + row * _ROW, hybrid, number, seq_length)
    write_png(sheet.figure, path)


def _subtitle(hybrid: HybridLayout, seq_length: int) -> str:
    parts = [
        f"{seq_length:,} tokens in blocks of {hybrid.block_size}",
        f"density {density(hybrid, seq_length):.3f}",
    ]
    runs = coverage_report(hybrid, seq_length).runs
    if runs:
        layer = min(covered.fraction for run in runs for covered in run.layers)
        union = min(run.union.fraction for run in runs)
        parts.append(f"coverage {percent(layer)} per layer" + (f", {percent(union)} per run" if union > layer else ""))
        parts.append(f"schedule {hybrid.schedule.name}")
    return "  ·  ".join(parts)


def _draw_field(axes: Axes, hybrid: HybridLayout, seq_length: int) -> None:
    """Draw the share of positions reached, by position and layers."""
    found = reach(hybrid, seq_length)
    layers = found.from_last.numpy()
    slowest, num_layers = int(layers.max()), len(hybrid.layers)
    rows = min(num_layers, max(4, slowest if (layers != NEVER).all() else num_layers))
    bins = min(_BINS, len(layers))
    edges = np.arange(bins) * len(layers) // bins
    sizes = np.diff([*edges, len(layers)])
    image = [np.add.reduceat(((layers != NEVER) & (layers <= count)).astype(float), edges) / sizes
             for count in range(1, rows + 1)]  # fmt: skip
    axes.imshow(image, cmap=REACHED, vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                extent=(0, seq_length, rows + 0.5, 0.5))  # fmt: skip
    for row in range(1, rows):
        axes.axhline(row + 0.5, color="white", linewidth=min(2.0, 12 / rows))
    plain(axes, 8)
    axes.spines[:].set_visible(False)
    ticks = [seq_length * part / 4 for part in range(5)]
    axes.set_xticks(ticks, [tokens(round(tick)) for tick in ticks])
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.set_xlabel("position (tokens)", fontsize=8, color=GREY)
    axes.set_ylabel("through the last n layers", fontsize=8, color=GREY)


def _draw_shares(axes: Axes, hybrid: HybridLayout, seq_length: int) -> None:
    """Draw attention FLOPs and KV cache over length, relative to dense layers."""
    lengths = _lengths(hybrid, seq_length)
    caches = [model_cache_tokens(hybrid, length) for length in lengths]
    curves = (
        ("attention FLOPs", [density(hybrid, length) for length in lengths], SPARSE[0], "o"),
        ("KV cache while decoding", [cache.end / cache.dense for cache in caches], SPARSE[1], "s"),
    )
    for name, values, colour, marker in curves:
        axes.plot(range(len(lengths)), values, color=colour, marker=marker, markersize=3.5, linewidth=1.6, label=name)
    if seq_length in lengths:
        axes.axvline(lengths.index(seq_length), color="#CCCCCC", linewidth=1, linestyle=":", zorder=0)
    plain(axes, 8)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xticks(range(len(lengths)), [tokens(length) for length in lengths])
    axes.grid(axis="y", color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("length (tokens)", fontsize=8, color=GREY)
    axes.legend(frameon=False, fontsize=8, loc="upper right", borderpad=0, handlelength=1.4)


def _lengths(hybrid: HybridLayout, seq_length: int) -> list[int]:
    """Return powers of two around the length, and the length itself."""
    heads = (head for layer in hybrid.layers for head in layer.heads)
    longest = known_blocks(heads, 1 << 62) * hybrid.block_size
    power = max(1, seq_length.bit_length() - 1)
    around = {1 << exponent for exponent in range(max(power - 3, 4), power + 4)} | {seq_length}
    return sorted(length for length in around if hybrid.block_size <= length <= longest or length == seq_length)


def _draw_layer(sheet: Sheet, top: float, hybrid: HybridLayout, number: int, seq_length: int) -> None:
    layer = hybrid.layers[number]
    all_blocks = layer.num_blocks(seq_length)
    num_blocks = min(all_blocks, LONGEST)
    alike = [str(other) for other, same in enumerate(hybrid.layers) if same == layer]
    shown = first_blocks(layer, num_blocks)
    offsets = " · offset" if any(offset_of(head) is not None for head in layer.heads) else ""
    others = f" and {len(alike) - 1} equal ones" if len(alike) > 1 else ""
    sheet.text(0.45, top, f"Layer {number}{others}", size=10, bold=True)
    sheet.text(0.45, top + 0.2, f"head{offsets}: first {shown} × {shown} blocks", size=8, colour=GREY)
    draw_heads(sheet.axes(0.45, top + 0.44, 5.0, 2.2), layer, num_blocks, form_colours(hybrid))
    reduced = reduce_masks(layer, num_blocks)
    cut = f", first {num_blocks:,} blocks" if num_blocks < all_blocks else ""
    share = union_coverage(layer.heads, num_blocks).fraction
    none = "" if share == 1 else "; orange: none"
    sheet.text(5.95, top + 0.2, f"any head sees {percent(share)}{none}{cut}", size=8, colour=GREY)
    draw_union(sheet.axes(5.95, top + 0.42, 2.0, 2.0), reduced, layer.block_size)
    sheet.text(8.55, top + 0.2, "heads that see a block", size=8, colour=GREY)
    draw_counts(sheet.axes(8.55, top + 0.42, 2.0, 2.0), reduced, len(layer.heads), layer.block_size)
