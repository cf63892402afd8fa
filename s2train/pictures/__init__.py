"""Draws layouts."""

from s2train.pictures.overview import choose_layers, draw_layout

__all__ = ["choose_layers", "draw_layout"]
