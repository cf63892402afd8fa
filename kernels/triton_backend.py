"""The Triton kernels as one differentiable function."""

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backward import backward
from .forward import forward
from .hopper.support import backward_choice, kernel_choice
from .interpreter import repair_interpreter
from .spec import AttentionSpec, from_bhsd, to_bhsd
from .tiles import last_contiguous
from .topk_layout import Layout, TopKLayout

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_interpreter()


class _TritonAttention(torch.autograd.Function):
    """The kernels' forward and backward for autograd.

    Maps views q, k, v [b, h, s, d] to output [b, h, s, d_v] and log-sum-exp [b, h, s].
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec
    ) -> tuple[Tensor, Tensor]:
        q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
        out, lse = run_forward(q, k, v, layout, spec)
        # save indices too, so that autograd detects writes to them before the backward
        indices = layout.indices if isinstance(layout, TopKLayout) else None
        ctx.save_for_backward(q, k, v, out, lse, indices)
        ctx.layout, ctx.spec = layout, spec
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # read once: non-reentrant checkpointing recomputes at the first read and rejects a second
        q, k, v, out, lse, _ = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None, None
        return *run_backward(q, k, v, out, lse, dout, dlse, ctx.layout, ctx.spec), None, None


def triton_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Compute output in `spec.format` and log-sum-exp float32 [b, h, s_q], both differentiable."""
    views = (to_bhsd(x, spec.format) for x in (q, k, v))
    out, lse = _TritonAttention.apply(*views, layout, spec)
    return from_bhsd(out, spec.format), lse


def run_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Compute output [b, h, s_q, d_v] and log-sum-exp.

    The arguments decide which kernels run. Inputs are views [b, h, s, d] with stride 1 along d.
    """
    if not spec.portable and kernel_choice(q, k, v, layout, spec) == "hopper":
        # imported here so that other GPUs need no Gluon
        from .hopper.forward import hopper_forward

        return hopper_forward(q, k, v, layout, spec)
    return forward(q, k, v, layout, spec)


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    layout: Layout, spec: AttentionSpec,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute gradients of q, k and v.

    Takes `run_forward`'s results and their gradients. A gradient of None counts as 0.
    """
    dout = torch.zeros_like(out) if dout is None else last_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    arguments = (q, k, v, out, lse, dout, dlse, layout, spec)
    if not spec.portable and backward_choice(q, k, v, layout, spec) == "hopper":
        from .hopper.backward import hopper_backward

        return hopper_backward(*arguments)
    return backward(*arguments)
