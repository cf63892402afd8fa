"""Random inputs, reproducible from a seed by head and in either format."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..spec import Format, from_bhsd
from .cases import Case

Name = Literal["q", "k", "v", "dout"]
_NAMES: tuple[Name, ...] = ("q", "k", "v", "dout")


def head_values(case: Case, name: Name, head: int, seed: int, device: torch.device) -> Tensor:
    """Return normal bfloat16 [length, dim] of one head.

    Equal arguments give equal values.
    """
    generator = torch.Generator(device).manual_seed((seed * 4 + _NAMES.index(name)) * 4096 + head)
    return torch.randn(case.length, case.dim, generator=generator, device=device, dtype=torch.bfloat16)


def make_inputs(case: Case, seed: int, format: Format, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make q, k, v and dout, contiguous in `format`.

    q, k and v are leaves that require gradients.
    """
    made = []
    for name in _NAMES:
        heads = case.kv_heads if name in ("k", "v") else case.heads
        sizes = (1, heads, case.length, case.dim)
        in_format = from_bhsd(torch.empty(sizes, dtype=torch.bfloat16, device="meta"), format).shape
        x = torch.empty(in_format, dtype=torch.bfloat16, device=device)
        for head in range(heads):
            values = head_values(case, name, head, seed, device)
            x.select(format.index("h"), head).copy_(values.unsqueeze(format.replace("h", "").index("b")))
        made.append(x if name == "dout" else x.requires_grad_())
    q, k, v, dout = made
    return q, k, v, dout


def positions_of(x: Tensor, format: Format, positions: Tensor) -> Tensor:
    """Return float64 [heads, positions, dim] of a tensor of batch 1."""
    x = x.detach().select(format.index("b"), 0)
    picked = x.index_select(format.replace("b", "").index("s"), positions)
    return (picked.transpose(0, 1) if format in ("sbhd", "bshd") else picked).double()
