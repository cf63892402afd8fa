"""Attention layers that are measured alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from s2train.attention.hybrid import build_hybrid_layout
from s2train.attention.kind import LayerLayout
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig

SIZES = (2, 4, 8)  # numbers of ranks over which `s2train.scaling.balance` divides a layer


@dataclass(frozen=True)
class Shape:
    """Sequence, heads and head dimension of a layer, batch 1."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def inputs(self, rows: int, kv_rows: int, heads: int, kv_heads: int, device: torch.device) -> list[Tensor]:
        """Draw q, k, v (leaves) and the output's gradient.

        bf16, or fp32 on a CPU.
        """
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        sizes = ((rows, heads), (kv_rows, kv_heads), (kv_rows, kv_heads), (rows, heads))
        tensors = [torch.randn(s, 1, h, self.dim, device=device, dtype=dtype) for s, h in sizes]
        return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]


@dataclass(frozen=True)
class Case:
    """One sparse layer: block size, pattern and layout schedule."""

    block: int
    local: int
    stride: int
    schedule: str

    @property
    def name(self) -> str:
        return f"b{self.block} l{self.local} v{self.stride} {self.schedule}"

    def layer(self, shape: Shape) -> LayerLayout:
        pattern = PatternConfig(local=self.local, stride=self.stride)
        hybrid = build_hybrid_layout(
            LayoutConfig("S", self.block, pattern, allow_partial_coverage=True),
            ScheduleConfig(self.schedule),
            num_layers=1,
            num_heads=shape.heads,
            num_query_groups=shape.kv_heads,
        )
        return hybrid.layers[0]
