"""Run backwards without their forwards, to compile both side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .spec import AttentionSpec, empty_bhsd

if TYPE_CHECKING:
    from .topk_layout import Layout

_FA4 = "flash_attn.cute.interface"


@contextmanager
def forwards_left_out() -> Iterator[None]:
    """Let the sparse op's and FlashAttention-4's forwards return zeros without a launch.

    Gradients are wrong then, but the backward's kernels are those of a step: output and log-sum-exp have the same
    shapes, strides and dtypes. FlashAttention-4's forward is left out if it was imported before.
    """
    from . import triton_backend  # imports Triton

    replaced: list[tuple[Any, str, Any]] = [(triton_backend, "run_forward", _no_forward)]
    if _FA4 in sys.modules:
        replaced.append((sys.modules[_FA4], "_flash_attn_fwd", _no_fa4_forward))
    own = [getattr(module, name) for module, name, _ in replaced]
    for module, name, instead in replaced:
        setattr(module, name, instead)
    try:
        yield
    finally:
        for (module, name, _), forward in zip(replaced, own, strict=True):
            setattr(module, name, forward)


def _no_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec, *_: Any) -> tuple[Tensor, Tensor]:
    out = empty_bhsd((*q.shape[:3], v.shape[3]), q, spec.format).zero_()
    return out, torch.zeros(q.shape[:3], dtype=torch.float32, device=q.device)


def _no_fa4_forward(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor | None, ...]:
    """Return output, log-sum-exp, and three results that causal calls don't have.

    q is [b, s, h, d], or [s, h, d] of packed documents.
    """
    *batch, length, heads, _dim = q.shape
    out = torch.zeros(*batch, length, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.zeros(*batch, heads, length, dtype=torch.float32, device=q.device)
    return out, lse, None, None, None
