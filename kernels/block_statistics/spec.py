"""Settings of a statistic's call, and the tensors of an effect."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StatisticSpec:
    """Settings of a call besides its tensors; see `block_mass` and `block_effects`."""

    block_size: int
    softmax_scale: float
    causal: bool
    query_offset: int


@dataclass(frozen=True)
class EffectInputs:
    """Tensors of `block_effects` and `rule_effects`, as views [b, h, s, d].

    lse and delta are [b, H, s_q].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    dout: Tensor
    delta: Tensor

    def with_products_in(self, dtype: torch.dtype) -> EffectInputs:
        """Cast the tensors that enter matrix products."""
        q, k, v, dout = (x.to(dtype) for x in (self.q, self.k, self.v, self.dout))
        return replace(self, q=q, k=k, v=v, dout=dout)
