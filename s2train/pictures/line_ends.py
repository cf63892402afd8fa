"""Labels lines at their right ends, instead of a legend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes


@dataclass(frozen=True)
class End:
    """Label at a line's right end, next to its last value."""

    text: str
    value: float
    colour: str


def label_ends(axes: Axes, ends: Sequence[End], gap: float, **style: Any) -> None:
    """Write the labels without overlap, once the axes have their limits.

    Args:
        gap: least distance of labels, as a share of the axes' height.
        style: of the text.
    """
    bottom, top = axes.get_ylim()
    height = bottom - gap * (top - bottom)
    for end in sorted(ends, key=lambda end: end.value):
        height = max(end.value, height + gap * (top - bottom))
        axes.annotate(
            end.text,
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=end.colour,
            **style,
        )
