"""Layouts for the tests of this folder, and the oracle: whole masks, written out."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.layouts.hybrid import HybridLayout, build_hybrid_layout
from s2train.layouts.patterns import Dense, LocalVertical, Pattern


@dataclass(frozen=True)
class Dilated:
    """Keeps every step-th diagonal: a pattern that isn't made of columns."""

    step: int

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((query - key) % self.step == 0)

    def describe(self) -> str:
        return f"every {self.step} blocks back"


local_verticals = st.builds(
    LocalVertical,
    local=st.integers(1, 20),
    stride=st.integers(1, 12),
    offset=st.integers(-20, 20),
    sinks=st.integers(0, 5),
)
column_patterns: st.SearchStrategy[Pattern] = st.one_of(local_verticals, st.builds(Dense))
patterns: st.SearchStrategy[Pattern] = st.one_of(column_patterns, st.builds(Dilated, st.integers(2, 5)))


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
) -> HybridLayout:
    return build_hybrid_layout(
        LayoutConfig(layers, block_size, PatternConfig(local, stride, sinks)),
        ScheduleConfig(kind),
        num_layers=num_layers,
        num_heads=num_heads,
        num_query_groups=num_query_groups or num_heads,
    )
