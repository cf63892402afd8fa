"""Writes figures as PNGs."""

from pathlib import Path

from matplotlib.figure import Figure

from s2train.files import replacing


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
