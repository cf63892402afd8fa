"""Random attention problems, and how far a backend's results lie from the float64 oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from s2train.kernels import BlockLayout, Layout, TopKLayout, block_sparse_attention, reference_attention
from s2train.kernels.check.run_time import random_indices
from s2train.kernels.relative_error import relative_error
from s2train.kernels.spec import from_bhsd
from torch import Tensor

# static for all sequences or for each; top-k lists of every head, or of the heads that share a KV head
LayoutKind = Literal["static", "static batch", "top-k", "top-k shared"]
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Problem:
    """Random q, k, v, per-head random layout and output gradients of one attention call."""

    heads: int = 2
    kv_heads: int = 2
    s_q: int = 63
    s_k: int = 63
    dim: int = 16
    v_dim: int | None = None
    block: int = 32
    batch: int = 1
    dtype: torch.dtype = torch.float32
    # With one key the output's gradient cancels in dq and dk, and what is left of it is rounding beside dlse's part.
    dout_scale: float = 1.0
    keep: float = 0.6  # of the blocks; below the diagonal too few to leave no row empty
    sink: bool = False  # every query keeps the first block
    layout: LayoutKind = "static"
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, device: torch.device) -> tuple[list[Tensor], Layout, Tensor, Tensor]:
        """q, k, v (leaves, in the format), layout, and the gradients of out and lse."""
        n_q = -(-(self.options.get("query_offset", 0) + self.s_q) // self.block)
        n_k = -(-self.s_k // self.block)
        layout = self._layout(n_q, n_k, device)
        shapes = [(self.heads, self.s_q, self.dim), (self.kv_heads, self.s_k, self.dim)]
        shapes.append((self.kv_heads, self.s_k, self.v_dim or self.dim))
        qkv = [self._random(shape, device).requires_grad_() for shape in shapes]
        dout = self._random((self.heads, self.s_q, self.v_dim or self.dim), device) * self.dout_scale
        dlse = torch.randn(self.batch, self.heads, self.s_q, device=device)
        return qkv, layout, dout, dlse

    def _layout(self, n_q: int, n_k: int, device: torch.device) -> Layout:
        if self.layout in ("static", "static batch"):
            batch = (self.batch,) if self.layout == "static batch" else ()
            mask = torch.rand(*batch, self.heads, n_q, n_k) < self.keep
            mask[..., 0] |= self.sink
            return BlockLayout.from_mask(mask, self.block, device=device)
        lists = self.heads if self.layout == "top-k" else self.kv_heads
        indices = random_indices(self.batch, lists, n_q, n_k, self.keep).to(device)
        if self.sink:
            indices[..., -1] = 0
        return TopKLayout.from_indices(indices, self.block, num_heads=self.heads, num_key_blocks=n_k)

    def _random(self, shape: tuple[int, int, int], device: torch.device) -> Tensor:
        x = torch.randn(self.batch, *shape, device=device).to(self.dtype)
        return from_bhsd(x, self.options.get("format", "sbhd")).contiguous()


def gradients(out: Tensor, lse: Tensor, inputs: list[Tensor], dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv; rows without keys have lse 0 here, as -inf has no distance."""
    finite = lse.masked_fill(lse == -torch.inf, 0)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        loss = loss + (finite * dlse.to(lse.dtype)).sum()
    return out, finite, *torch.autograd.grad(loss, inputs)


def assert_as_exact_as_torch(
    problem: Problem, backend: str, device: torch.device, lse_gradient: bool = True, split_columns: bool = False
) -> None:
    """The backend's error against float64 is at most twice that of plain torch in the inputs' dtype."""
    inputs, layout, dout, dlse = problem.make(device)
    weight = dlse if lse_gradient else None

    def reference(dtype: torch.dtype) -> tuple[Tensor, ...]:
        cast = [x.detach().to(dtype).requires_grad_() for x in inputs]
        return gradients(*reference_attention(*cast, layout, **problem.options), cast, dout, weight)

    options = problem.options | {"split_columns": split_columns}
    out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend=backend, **options)
    assert lse.dtype == torch.float32
    assert out.dtype == problem.dtype
    assert out.is_contiguous()
    exact, plain = reference(torch.float64), reference(problem.dtype)
    assert_as_exact(gradients(out, lse, inputs, dout, weight), exact, plain)


def assert_as_exact(measured: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor]) -> None:
    """Errors of out, lse, dq, dk, dv against `exact` are at most twice those of plain torch in the inputs' dtype."""
    for name, x, x64, x_plain in zip(NAMES, measured, exact, plain, strict=True):
        error, allowed = relative_error(x, x64), relative_error(x_plain, x64)
        # a float32 result is not blamed for its last bits
        assert error <= 2 * allowed + 3e-7, f"{name}: relative error {error:.1e}, plain torch {allowed:.1e}"
