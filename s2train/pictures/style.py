"""Colours and axes that all panels share.

Okabe and Ito's palette can be distinguished with any kind of colour vision.
"""

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from s2train.attention.hybrid import HybridLayout
from s2train.layouts.patterns import Dense, Pattern

DENSE = "#2E3440"
SPARSE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # one per form of pattern, repeated
UNSEEN = "#D55E00"  # blocks that no head of the layer keeps
PAPER = "#F3F3F0"  # blocks that are not kept
GREY = "#666666"
CURVES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # one per curve, repeated

COUNTS = LinearSegmentedColormap.from_list("counts", ["#D6E6F2", "#56A3D0", "#0072B2", "#08306B"])
COVERED = LinearSegmentedColormap.from_list("covered", [UNSEEN, "#F6EBD8", "#0072B2"])
REACHED = LinearSegmentedColormap.from_list("reached", [PAPER, "#0072B2"])


class Sheet:
    """Figure whose panels are placed in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=150, facecolor="white")

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self.height - top - height
        return self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def text(
        self, left: float, top: float, words: str, *, size: float = 9, colour: str = "black", bold: bool = False
    ) -> None:
        """Write text with its top left corner at the position."""
        self.figure.text(
            left / self.width,
            1 - top / self.height,
            words,
            fontsize=size,
            color=colour,
            fontweight="bold" if bold else "normal",
            va="top",
        )


def form_colours(hybrid: HybridLayout) -> dict[str, str]:
    """Assign a colour to each form of sparse pattern, in layer order."""
    forms = dict.fromkeys(head.form() for layer in hybrid.layers for head in layer.heads if not isinstance(head, Dense))
    return {form: SPARSE[number % len(SPARSE)] for number, form in enumerate(forms)}


def shade(colour: str, density: float) -> tuple[float, float, float]:
    """Lighten a colour at low density: from full to about a third."""
    strength = 0.35 + 0.65 * density**0.5
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(colour))
    return red, green, blue


def offset_of(head: Pattern) -> int | None:
    """Return the head's offset from the layout schedule; None without one."""
    return getattr(head, "offset", None)


def tokens(count: float) -> str:
    """Format 131072 as 128k, 1048576 as 1M, 1000 as 1000."""
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if count >= size and count % (size / 4) == 0:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def plain(axes: Axes, size: float = 7.5) -> None:
    """Remove the box, and use small grey ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#BBBBBB")
    axes.tick_params(labelsize=size, length=2, colors=GREY)
