"""Pattern of a local window and vertical strides."""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from s2train.layouts.patterns.base import BandedPattern, HeadPatterns, LayerContext, at_least, ones, scheduled


@dataclass(frozen=True)
class LocalVertical(BandedPattern):
    """Keep a local window, strided columns and sinks.

    Keeps distances d < local, key blocks with (j - offset) mod stride = 0, and sinks. The first `sinks` key blocks are
    kept by every query. The offset is stored modulo the stride.

    Raises:
        PatternError: local or stride below 1, or sinks below 0.
    """

    local: int
    stride: int
    offset: int
    sinks: int = 0

    kv_efficient = True  # a key block outside the window is kept by all later queries (column or sink) or by none

    def __post_init__(self) -> None:
        at_least(1, local=self.local, stride=self.stride)
        at_least(0, sinks=self.sinks)
        object.__setattr__(self, "offset", self.offset % self.stride)

    @property
    def limits(self) -> tuple[int, ...]:
        return (self.local,)

    def columns(self, band: int, key: Tensor) -> Tensor:
        return ones(key) if band == 0 else ((key - self.offset) % self.stride == 0) | (key < self.sinks)

    @property
    def period(self) -> int:
        return self.stride

    def shifted(self, offset: int) -> Self:
        return replace(self, offset=offset)

    def form(self) -> str:
        sinks = f", sinks {self.sinks}" if self.sinks else ""
        return f"local {self.local}, stride {self.stride}{sinks}"

    def describe(self) -> str:
        return f"{self.form()}, offset {self.offset}"

    def narrower(self, widest: int) -> str:
        return f"stride={widest} or less"


def local_vertical_heads(local: int, stride: int, sinks: int, offset: int | None) -> HeadPatterns:
    """Return heads at the schedule's offsets, or all at one offset.

    Raises:
        PatternError: local or stride below 1, or sinks below 0.
    """
    if offset is None:
        return scheduled(LocalVertical(local, stride, 0, sinks))
    pattern = LocalVertical(local, stride, offset, sinks)
    return lambda layer: (pattern,) * layer.num_heads


@dataclass(frozen=True)
class ReferenceVertical(LocalVertical):
    """A head of the reference library's layout.

    Schedules do not move its offset.
    """

    @property
    def period(self) -> int:
        return 1

    def shifted(self, offset: int) -> Self:
        return self

    def form(self) -> str:
        return f"{super().form()}, reference offsets"


def reference_heads(local: int, stride: int, offset: int, per_kv_head: bool) -> HeadPatterns:
    """Return heads as in the reference library, including blind spots.

    The reference is dkernel, as in Phi-3-small's attention. Head h keeps d < local and
    (j + h max(1, floor(stride / H)) + offset) mod stride = 0, with H query heads. h counts query heads, or KV heads
    with `per_kv_head`, so that a group shares its columns. The deployed model has 32 layers of 32 query and 8 KV heads,
    blocks of 64, local 16, stride 8, offset 1, and every second layer dense.

    Raises:
        PatternError: local or stride below 1.
    """
    ReferenceVertical(local, stride, 0)

    def heads(layer: LayerContext) -> tuple[ReferenceVertical, ...]:
        step = max(1, stride // layer.num_heads)
        group = layer.num_heads // layer.num_query_groups if per_kv_head else 1
        return tuple(
            ReferenceVertical(local, stride, -(head // group * step + offset)) for head in range(layer.num_heads)
        )

    return heads
