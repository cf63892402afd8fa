"""The Triton kernels of HyperAttention as one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import spec as specs
from ..saved import NAMES, as_saved, properties
from ..spec import AttentionSpec, from_bhsd, to_bhsd
from ..tiles import last_contiguous
from . import launches
from .launches import Call, Rows, call_of
from .plan import Plan
from .settings import HyperSettings


class _HyperAttention(torch.autograd.Function):
    """Maps views q, k, v to output and log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, projection_seeds: Tensor,
        sample_seeds: Tensor, spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
        call = call_of(q, k, v, settings, spec)
        out, lse, plan = run_forward(q, k, v, call, projection_seeds, sample_seeds)
        saved = (q, k, v, out, lse, *(() if plan is None else plan.tensors()))
        ctx.save_for_backward(*saved)
        ctx.saved = properties(*saved)
        ctx.call, ctx.sizes = call, None if plan is None else plan.sizes()
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        nothing = (None,) * 4
        if dout is None and dlse is None:
            return None, None, None, *nothing
        names = (*NAMES, *["an array of the plan"] * (len(saved) - len(NAMES)))
        q, k, v, out, lse, *arrays = as_saved(saved, names, ctx.saved)
        plan = None if ctx.sizes is None else Plan(*ctx.sizes, *arrays)
        return *run_backward(q, k, v, out, lse, dout, dlse, plan, ctx.call), *nothing


def triton_hyper_attention(
    q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, projection_seeds: Tensor, sample_seeds: Tensor,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute output in `spec.format` and log-sum-exp float32 [b, H, n], both differentiable."""
    views = (to_bhsd(x, spec.format) for x in (q, k, v))
    out, lse = _HyperAttention.apply(*views, settings, projection_seeds, sample_seeds, spec)
    return from_bhsd(out, spec.format), lse


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, projection_seeds: Tensor, sample_seeds: Tensor
) -> tuple[Tensor, Tensor, Plan | None]:
    """Compute output, log-sum-exp, and the backward's plan.

    The plan is None where all keys are exact.
    """
    local = launches.local_forward(q, k, v, call) if call.local else None
    if local is not None and call.short:
        return *local, None
    plan = launches.plan_of(q, k, call, projection_seeds, sample_seeds)
    out, lse = launches.sample_forward(q, launches.sampled(k, plan), launches.sampled(v, plan), local, plan, call)
    launches.bucket_forward(q, k, v, out, lse, plan, call)
    return _cast(out, q, call), lse, plan


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    plan: Plan | None, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute gradients of q, k and v, contiguous in the format.

    A gradient of None counts as 0.
    """
    dout = torch.zeros_like(out) if dout is None else last_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    local = launches.local_backward(q, k, v, out, lse, dout, dlse, call) if call.local else None
    if plan is None:
        assert local is not None
        return local
    rows = Rows(q, dout, lse, launches.delta_of(out, dout, lse, dlse))
    k_s, v_s = launches.sampled(k, plan), launches.sampled(v, plan)
    dq = launches.sample_dq(rows, k_s, v_s, None if local is None else local[0], plan, call)
    launches.bucket_dq(rows, k, v, dq, plan, call)
    dk, dv = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if local is None else _float32(local[i])
        for i, x in ((1, k), (2, v))
    )
    del local
    launches.sample_dkdv(rows, k_s, v_s, dk, dv, plan, call)
    launches.bucket_dkdv(rows, k, v, dk, dv, plan, call)
    return _cast(dq, q, call), _cast(dk, q, call), _cast(dv, q, call)


def _cast(x: Tensor, like: Tensor, call: Call) -> Tensor:
    """Copy to `like`'s dtype, contiguous in the call's format."""
    b, h, n, d = x.shape
    return specs.empty_bhsd((b, h, n, d), like, call.spec.format).copy_(x)


def _float32(x: Tensor) -> Tensor:
    """Copy to float32 [b, h, n, d], contiguous in this order."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)
