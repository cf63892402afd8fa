"""Patterns equal for all heads: a window, and global blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.layouts.patterns.base import BandedPattern, PatternError, at_least, ones


@dataclass(frozen=True)
class SlidingWindow(BandedPattern):
    """Keep d < window and the first `sinks` key blocks.

    Raises:
        PatternError: a window below 1, or sinks below 0.
    """

    window: int
    sinks: int = 0

    kv_efficient = True

    def __post_init__(self) -> None:
        at_least(1, window=self.window)
        at_least(0, sinks=self.sinks)

    @property
    def limits(self) -> tuple[int, ...]:
        return (self.window,)

    def columns(self, band: int, key: Tensor) -> Tensor:
        return ones(key) if band == 0 else key < self.sinks

    def form(self) -> str:
        return f"window {self.window}" + (f", sinks {self.sinks}" if self.sinks else "")


@dataclass(frozen=True)
class GlobalBlocks(BandedPattern):
    """Keep d < local and a fixed set of key blocks.

    Raises:
        PatternError: local below 1, or a block below 0.
    """

    local: int
    blocks: tuple[int, ...]  # ascending

    kv_efficient = True

    def __post_init__(self) -> None:
        at_least(1, local=self.local)
        if any(block < 0 for block in self.blocks):
            raise PatternError("globals", list(self.blocks), "a block below 0", "Count key blocks from 0.")
        object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    @classmethod
    def read(cls, local: int, globals: Sequence[int]) -> "GlobalBlocks":
        """Make the pattern from its settings."""
        return cls(local, tuple(globals))

    @property
    def limits(self) -> tuple[int, ...]:
        return (self.local,)

    def columns(self, band: int, key: Tensor) -> Tensor:
        return ones(key) if band == 0 else torch.isin(key, torch.tensor(self.blocks, device=key.device))

    def form(self) -> str:
        shown = ", ".join(map(str, self.blocks[:4])) + (", …" if len(self.blocks) > 4 else "")
        return f"local {self.local}, {len(self.blocks)} global blocks ({shown})"
