"""Layouts of small models for decoding tests."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.layouts.patterns import Dense, LocalVertical, Pattern
from s2train.layouts.patterns.file import write_masks
from s2train.layouts.schedules import find_schedule

BLOCK, VOCABULARY, NUM_BLOCKS = 16, 96, 6


@dataclass(frozen=True)
class Scattered:
    """Keeps the diagonal and irregular blocks: a later query may need a block that earlier ones don't."""

    seed: int

    def keep(self, query: Tensor, key: Tensor) -> Tensor:
        mixed = (query * 7919 + key * 104729 + self.seed * 15485863) % 1009
        return (query == key) | ((query > key) & (mixed < 400))

    def describe(self) -> str:
        return "scattered"


def vertical(offset: int, sinks: int = 0) -> LocalVertical:
    return LocalVertical(1, 3, offset, sinks)


# Models that rotate half of a head's dimensions.
HALF_TURNED = ("sinks", "mqa")
# Heads of each layer, and their number of KV heads.
MODELS: dict[str, tuple[list[Sequence[Pattern]], int]] = {
    "dense": ([[Dense()] * 4] * 2, 2),
    "sparse": ([[vertical(h) for h in range(4)]] * 2, 4),
    "sinks": ([[vertical(h, sinks=2) for h in range(4)]] * 2, 4),
    "hybrid": ([[Dense()] * 4, [vertical(h // 2) for h in range(4)]] * 2, 2),
    "a dense head": ([[Dense(), *(vertical(h) for h in range(3))]] * 2, 4),
    "different heads in a group": ([[vertical(h) for h in range(4)], [vertical(h + 1) for h in range(4)]], 2),
    "mqa": ([[vertical(h) for h in range(4)]] * 2, 1),
    "scattered": ([[Scattered(h) for h in range(4)], [Scattered(h + 4) for h in range(4)]], 2),
}

# What tensor parallel ranks decode too: dense layers, heads of which one is dense, heads of a group that differ, one KV
# head for all ranks.
DIVIDED = ("hybrid", "a dense head", "different heads in a group", "mqa")

# Settings of each registered pattern, such that some heads drop blocks within NUM_BLOCKS.
REGISTERED: dict[str, PatternConfig] = {
    "local_vertical": PatternConfig(local=1, stride=4, sinks=1),
    "ranges": PatternConfig(
        "ranges", ranges=[[1, 1], [2, 2], [None, 3]]
    ),  # later queries need blocks that earlier ones don't
    "sliding_window": PatternConfig("sliding_window", window=2, sinks=1),
    "global_blocks": PatternConfig("global_blocks", local=1, globals=[0, 3]),
    "dilated": PatternConfig("dilated", local=1, dilation=3),
    "dense": PatternConfig("dense"),
    "reference": PatternConfig("reference", local=1, stride=4, offset=1),
    "span": PatternConfig("span", base=1, slope=0.4, sinks=1),
    "per_head": PatternConfig(
        "per_head",
        rules=[{"kind": "span", "base": 2}, {"kind": "local_vertical", "local": 1, "stride": 3, "offset": 2}],
        heads=[[0, 1, 1, 0], [1, 1, 0, 0]],
    ),
    "file": PatternConfig("file", file=""),  # random masks
}


def layers_of(*heads: Sequence[Pattern], block_size: int, num_kv_heads: int) -> HybridLayout:
    """A layout of layers with these query heads."""
    kinds = [LETTERS["D" if all(isinstance(h, Dense) for h in layer) else "S"] for layer in heads]
    layers = tuple(LayerLayout(kind, tuple(layer), block_size) for kind, layer in zip(kinds, heads, strict=True))
    return HybridLayout(layers, block_size, num_kv_heads, find_schedule(ScheduleConfig(kind="shifted")))


def hybrid_of(name: str, block_size: int = BLOCK) -> HybridLayout:
    """The layout of one of MODELS."""
    heads, groups = MODELS[name]
    return layers_of(*heads, block_size=block_size, num_kv_heads=groups)


def registered(kind: str, schedule: str = "shifted") -> HybridLayout:
    """Two layers of four heads in two groups, all of a pattern of PATTERNS."""
    pattern = REGISTERED[kind]
    with tempfile.TemporaryDirectory() as folder:
        if kind == "file":
            kept = torch.rand(2, 4, NUM_BLOCKS, NUM_BLOCKS).tril() > 0.5
            masks = dict(enumerate((kept | torch.eye(NUM_BLOCKS, dtype=torch.bool)).numpy()))
            pattern = replace(pattern, file=str(Path(folder) / "masks.npz"))
            write_masks(Path(folder) / "masks.npz", masks, BLOCK)
        layout = LayoutConfig("S", BLOCK, pattern)
        return build_hybrid_layout(layout, ScheduleConfig(schedule), num_layers=2, num_heads=4, num_query_groups=2)
