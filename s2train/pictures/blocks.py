"""Draws block masks: each head's, their union, and head counts."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.layouts.masks import mask_rows
from s2train.layouts.patterns import BandedPattern, Dense, Dilated, Pattern
from s2train.pictures.style import COUNTS, COVERED, DENSE, GREY, PAPER, UNSEEN, offset_of, plain, tokens

_SQUARES = 128  # most squares along a side of a reduced mask
LONGEST = 4096  # most blocks drawn; more would take long
_LABEL, _GAP, _LARGEST = 0.12, 0.05, 1.1  # inches: label above a mask, gap between masks, largest side of a mask
_LABELLED = 0.33  # inches: smaller masks have no label
_FIRST = 32  # least number of blocks drawn of a head's mask; its window and period may need more


@dataclass(frozen=True)
class Reduced:
    """A layer's masks averaged over causal pairs in squares: float64 [m, m].

    Attributes:
        union: share of pairs that any head keeps; NaN in squares without causal pairs.
        heads: mean number of heads that keep a pair; NaN likewise.
        num_blocks: number of blocks that the m squares cover.
    """

    union: np.ndarray
    heads: np.ndarray
    num_blocks: int


def reduce_masks(layer: LayerLayout, num_blocks: int) -> Reduced:
    """Average a layer's masks over squares.

    Area averages avoid aliasing of fine stripes. Squares hold whole periods if possible, which avoids moiré patterns.
    """
    side, period = -(-num_blocks // _SQUARES), max(head.period for head in layer.heads)
    side = -(-side // period) * period if 2 * side > period else side
    of_pattern = {pattern: layer.heads.count(pattern) for pattern in dict.fromkeys(layer.heads)}
    union, heads, causal = [], [], []
    rows = [mask_rows(pattern, num_blocks, side) for pattern in of_pattern]
    for parts in zip(*rows, strict=True):
        masks = [mask for _, mask in parts]
        first = parts[0][0]
        seen = masks[0].clone()
        for mask in masks[1:]:
            seen |= mask
        union.append(_pool(seen, side))
        counts = [count * _pool(mask, side) for mask, count in zip(masks, of_pattern.values(), strict=True)]
        heads.append(torch.stack(counts).sum(0))
        before = torch.arange(first, first + len(seen))[:, None] >= torch.arange(num_blocks)
        causal.append(_pool(before, side))
    pairs = torch.cat(causal).double().numpy()
    with np.errstate(invalid="ignore"):
        shares = [torch.cat(parts).double().numpy() / pairs for parts in (union, heads)]
    return Reduced(shares[0], shares[1], num_blocks)


def _pool(mask: Tensor, side: int) -> Tensor:
    """Sum over squares.

    Returns:
        float32 [ceil(rows / side), ceil(columns / side)]; squares at the end may be partial.
    """
    padded = F.pad(mask.float(), (0, -mask.shape[1] % side, 0, -mask.shape[0] % side))
    return F.avg_pool2d(padded[None, None], side, divisor_override=1)[0, 0]


def first_blocks(layer: LayerLayout, num_blocks: int) -> int:
    """Return how many blocks show a layer's differences: window and two periods."""
    needed = [_window(head) + 2 * head.period for head in set(layer.heads)]
    return min(num_blocks, max(_FIRST, *needed))


def _window(pattern: Pattern) -> int:
    if isinstance(pattern, BandedPattern):
        return next(iter(pattern.limits), 1)
    return pattern.local if isinstance(pattern, Dilated) else 1


def draw_heads(axes: Axes, layer: LayerLayout, num_blocks: int, colours: dict[str, str]) -> None:
    """Draw the start of every head's mask, labelled with number and offset."""
    num_heads, shown = len(layer.heads), first_blocks(layer, num_blocks)
    box = axes.get_window_extent()
    width, height = box.width / axes.figure.dpi, box.height / axes.figure.dpi
    columns = _columns(num_heads, width, height)
    side, across = _side(num_heads, columns, width, height), min(width / columns, height)
    masks = {head: _mask(head, shown) for head in dict.fromkeys(layer.heads)}
    for number, head in enumerate(layer.heads):
        image = np.ones((shown, shown, 3))
        image[np.tri(shown, dtype=bool)] = to_rgb(PAPER)
        image[masks[head]] = to_rgb(DENSE if isinstance(head, Dense) else colours[head.form()])
        left, top = number % columns * across, number // columns * (side + _LABEL + _GAP) + _LABEL
        axes.imshow(image, interpolation="antialiased", extent=(left, left + side, top + side, top))
        offset = offset_of(head)
        words = f"{number}" + ("" if offset is None else f" · {offset}")
        if side >= _LABELLED:
            axes.text(left, top - 0.03, words, fontsize=min(7.5, 14 * side), color=GREY)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.set_axis_off()


def _side(count: int, columns: int, width: float, height: float) -> float:
    """Return the side of `count` squares in `columns` columns, in inches."""
    return min(width / columns - _GAP, height / -(-count // columns) - _LABEL - _GAP, _LARGEST)


def _columns(count: int, width: float, height: float) -> int:
    """Return the number of columns with the largest squares, preferring full rows."""
    return max(
        range(1, count + 1),
        key=lambda columns: _side(count, columns, width, height) * (1 if count % columns == 0 else 0.8),
    )


def _mask(pattern: Pattern, num_blocks: int) -> np.ndarray:
    blocks = torch.arange(num_blocks)
    return pattern.keep(blocks[:, None], blocks[None, :]).numpy()


def draw_union(axes: Axes, reduced: Reduced, block_size: int) -> None:
    """Draw the share of pairs that any head keeps."""
    _draw(axes, COVERED(reduced.union), reduced, block_size)


def draw_counts(axes: Axes, reduced: Reduced, num_heads: int, block_size: int) -> None:
    """Draw the mean number of heads per block, marking unseen blocks."""
    norm = LogNorm(1, max(2, num_heads))
    image = COUNTS(norm(np.clip(np.nan_to_num(reduced.heads), 1, None)))
    image[reduced.heads == 0] = (*to_rgb(UNSEEN), 1)
    _draw(axes, image, reduced, block_size)
    bar = axes.figure.colorbar(ScalarMappable(norm, COUNTS), cax=axes.inset_axes((0.58, 0.9, 0.4, 0.04)),
                               orientation="horizontal")  # fmt: skip
    ticks = sorted({1, *(num_heads // part for part in (4, 1) if num_heads // part > 1)})
    bar.set_ticks(ticks, labels=[str(tick) for tick in ticks], fontsize=7, color=GREY)
    bar.ax.minorticks_off()
    bar.ax.tick_params(length=0, pad=2)
    bar.outline.set_visible(False)


def _draw(axes: Axes, image: np.ndarray, reduced: Reduced, block_size: int) -> None:
    """Draw colours [m, m, 4] of causal squares, with axes in tokens."""
    image[np.isnan(reduced.union)] = 1
    num_blocks = reduced.num_blocks
    axes.imshow(image, interpolation="antialiased", extent=(0, num_blocks, num_blocks, 0))
    plain(axes)
    ticks = [num_blocks * part / 2 for part in range(3)]
    words = [tokens(round(tick * block_size)) for tick in ticks]
    axes.set_xticks(ticks, words)
    axes.set_yticks(ticks, words)
