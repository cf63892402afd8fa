"""Random problems of HyperAttention, and how far results lie from the float64 oracle's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from s2train.kernels.hyper import HyperSettings, hyper_attention, reference_hyper_attention
from s2train.kernels.hyper.hashing import hash_ranks
from s2train.kernels.spec import from_bhsd, to_bhsd
from torch import Tensor

from tests.kernels.cases import assert_as_exact

SMALL = HyperSettings(bucket=16, samples=8, projections=8, shortest=32, window=16, sinks=16)


@dataclass(frozen=True)
class HyperProblem:
    """Random q, k, v, seeds and gradients of the results."""

    length: int = 75
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    v_dim: int | None = None
    batch: int = 1
    dtype: torch.dtype = torch.float32
    settings: HyperSettings = SMALL
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, device: torch.device) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """q, k, v (leaves, in the format), seeds [2, H_kv], and the gradients of out and lse."""
        shapes = [(self.heads, self.dim), (self.kv_heads, self.dim), (self.kv_heads, self.v_dim or self.dim)]
        qkv = [self._random(*shape, device).requires_grad_() for shape in shapes]
        seeds = torch.randint(1 << 62, (2, self.kv_heads), device=device)
        dout = self._random(self.heads, self.v_dim or self.dim, device)
        return qkv, seeds, dout, torch.randn(self.batch, self.heads, self.length, device=device)

    def _random(self, heads: int, dim: int, device: torch.device) -> Tensor:
        x = torch.randn(self.batch, heads, self.length, dim, device=device).to(self.dtype)
        return from_bhsd(x, self.options.get("format", "sbhd")).contiguous()


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    return out, lse, *torch.autograd.grad((out, lse), inputs, (dout.to(out.dtype), dlse.to(lse.dtype)))


def assert_as_exact_as_torch(problem: HyperProblem, backend: str, device: torch.device) -> None:
    """The error against float64 is at most twice that of plain torch in the inputs' dtype, on the same buckets."""
    inputs, seeds, dout, dlse = problem.make(device)
    settings, options = problem.settings, problem.options
    format = options.get("format", "sbhd")
    # a product near 0 may have another sign where it is summed in another order: a query would read another bucket
    if device.type == "cuda" and backend != "torch":
        from s2train.kernels.hyper.launches import hash_all as hash_both
    else:
        hash_both = hash_ranks
    q, k = (to_bhsd(x.detach(), format) for x in inputs[:2])
    ranks = hash_both(q, k, seeds[0], settings.projections)

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        return gradients(*reference_hyper_attention(*cast, settings, *seeds, ranks=ranks, **options), cast, dout, dlse)

    out, lse = hyper_attention(*inputs, settings, *seeds, return_lse=True, backend=backend, **options)
    assert out.dtype == problem.dtype
    assert lse.dtype == torch.float32
    assert out.is_contiguous()
    exact, plain = reference(torch.float64), reference(problem.dtype)
    assert_as_exact(gradients(out, lse, inputs, dout, dlse), exact, plain)
