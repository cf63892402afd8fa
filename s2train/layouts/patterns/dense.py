"""Pattern that keeps every causal block."""

from dataclasses import dataclass

from torch import Tensor

from s2train.layouts.patterns.base import BandedPattern, ones


@dataclass(frozen=True)
class Dense(BandedPattern):
    """Keeps every causal block."""

    limits = ()
    kv_efficient = True

    def columns(self, band: int, key: Tensor) -> Tensor:
        return ones(key)

    def form(self) -> str:
        return "dense"
