"""Patterns: which key blocks one head keeps.

A pattern is one class, in closed form or from a mask; `registry` names them.
"""

from s2train.layouts.patterns.base import BandedPattern, DistancePattern, LayerContext, Pattern
from s2train.layouts.patterns.dense import Dense
from s2train.layouts.patterns.dilated import Dilated
from s2train.layouts.patterns.file import MaskPattern, known_blocks
from s2train.layouts.patterns.local_vertical import LocalVertical, ReferenceVertical
from s2train.layouts.patterns.ranges import Ranges
from s2train.layouts.patterns.span import Span
from s2train.layouts.patterns.window import GlobalBlocks, SlidingWindow

__all__ = [
    "BandedPattern",
    "Dense",
    "Dilated",
    "DistancePattern",
    "GlobalBlocks",
    "LayerContext",
    "LocalVertical",
    "MaskPattern",
    "Pattern",
    "Ranges",
    "ReferenceVertical",
    "SlidingWindow",
    "Span",
    "known_blocks",
]
