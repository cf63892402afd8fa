"""Layouts for the tests of this folder, and the oracle: whole masks, written out."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.layouts.patterns import (
    Dense,
    Dilated,
    GlobalBlocks,
    LocalVertical,
    MaskPattern,
    Pattern,
    Ranges,
    ReferenceVertical,
    SlidingWindow,
    Span,
)

local_verticals = st.builds(
    LocalVertical,
    local=st.integers(1, 20),
    stride=st.integers(1, 12),
    offset=st.integers(-20, 20),
    sinks=st.integers(0, 5),
)


@dataclass(frozen=True)
class Triangle(Pattern):
    """Keeps the first half of what is before a query: of none of the forms that are counted by themselves."""

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query // 2) | (query == key)

    def form(self) -> str:
        return "triangle"

    @property
    def kv_efficient(self) -> bool:
        return False


@st.composite
def _ranges(draw: st.DrawFn) -> Ranges:
    limits = sorted(draw(st.sets(st.integers(1, 25), max_size=3)))
    strides = draw(st.lists(st.integers(1, 8), min_size=len(limits) + 1, max_size=len(limits) + 1))
    ranges = tuple(zip([*limits, None], strides, strict=True))
    return Ranges(ranges, draw(st.integers(0, 10)), draw(st.integers(0, 3)))


@st.composite
def _dilated(draw: st.DrawFn) -> Dilated:
    local = draw(st.integers(1, 8))
    window = draw(st.one_of(st.none(), st.integers(local, 20)))
    return Dilated(local, draw(st.integers(1, 6)), draw(st.integers(0, 8)), window)


@st.composite
def _masks(draw: st.DrawFn) -> MaskPattern:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_blocks = draw(st.integers(70, 75))
    mask = rng.random((num_blocks, num_blocks)) < draw(st.floats(0, 1))
    if draw(st.booleans()):  # once dropped, gone
        mask = np.logical_and.accumulate(mask | np.eye(num_blocks, dtype=bool) | ~np.tri(num_blocks, dtype=bool), 0)
    return MaskPattern.of(np.tril(mask) | np.eye(num_blocks, dtype=bool), "masks.npz", "layout.pattern")


windows = st.builds(SlidingWindow, st.integers(1, 20), st.integers(0, 5))
global_blocks = st.builds(GlobalBlocks, st.integers(1, 8), st.lists(st.integers(0, 45), max_size=4).map(tuple))
references = st.builds(ReferenceVertical, st.integers(1, 20), st.integers(1, 12), st.integers(-20, 20))
spans = st.builds(Span, st.integers(1, 8), st.sampled_from([0, 0.1, 0.25, 0.5, 0.7, 0.95]), st.integers(0, 5))
ranges, dilated, masks = _ranges(), _dilated(), _masks()
banded_patterns: st.SearchStrategy[Pattern] = st.one_of(
    local_verticals, ranges, windows, global_blocks, references, st.builds(Dense)
)
patterns: st.SearchStrategy[Pattern] = st.one_of(banded_patterns, dilated, masks, spans, st.builds(Triangle))


def mask_of(pattern: Pattern, num_blocks: int) -> Tensor:
    """Bool [n, n]."""
    blocks = torch.arange(num_blocks)
    return pattern.keep(blocks[:, None], blocks[None, :])


def union_of(heads: Iterable[Pattern], num_blocks: int) -> Tensor:
    """Bool [n, n]: kept by any head."""
    return torch.stack([mask_of(head, num_blocks) for head in heads]).any(0)


def make_hybrid(
    layers: str,
    *,
    num_layers: int,
    num_heads: int,
    num_query_groups: int | None = None,
    kind: str = "shifted",
    local: int = 2,
    stride: int = 4,
    sinks: int = 0,
    block_size: int = 16,
    pattern: PatternConfig | None = None,
    patterns: dict[str, Any] | None = None,
    offsets: Any = None,
    dense_heads: int = 0,
) -> HybridLayout:
    pattern = pattern or PatternConfig(local=local, stride=stride, sinks=sinks)
    return build_hybrid_layout(
        LayoutConfig(layers, block_size, pattern, patterns or {}),
        ScheduleConfig(kind, offsets, dense_heads),
        num_layers=num_layers,
        num_heads=num_heads,
        num_query_groups=num_query_groups or num_heads,
    )
