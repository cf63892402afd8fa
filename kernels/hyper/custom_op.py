"""Custom operators of HyperAttention's kernels for torch.compile, opaque to tracing.

Only traced calls use them. The backward makes the plan again from q, k and seeds, with the same kernels, so that it is
the forward's: graphs then hold no tensors of the plan.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import cast

import torch
from torch import Tensor

from ..custom_op import register_gradients
from ..spec import AttentionSpec, Format, from_bhsd, shape_bhsd, to_bhsd
from ..tiles import last_contiguous
from . import launches, triton_backend
from .launches import Call, call_of
from .settings import HyperSettings


@torch.library.custom_op("s2train::hyper_attention", mutates_args=())
def attend(
    q: Tensor, k: Tensor, v: Tensor, projection_seeds: Tensor, sample_seeds: Tensor, settings: list[int],
    softmax_scale: float, causal: bool, format: str, portable: bool, split_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute output and log-sum-exp as `hyper_attention` does.

    `settings` are those of `HyperSettings` in order.
    """
    views, call = _call(q, k, v, settings, softmax_scale, causal, format, portable, split_columns)
    out, lse, _ = triton_backend.run_forward(*views, call, projection_seeds, sample_seeds)
    return from_bhsd(out, call.spec.format), lse


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, projection_seeds: Tensor, sample_seeds: Tensor, settings: list[int],
    softmax_scale: float, causal: bool, format: str, portable: bool, split_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse = q.new_empty(shape_bhsd(q, cast(Format, format))[:3], dtype=torch.float32)
    return q.new_empty((*q.shape[:3], v.shape[3])), lse


@torch.library.custom_op("s2train::hyper_attention_backward", mutates_args=())
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    projection_seeds: Tensor, sample_seeds: Tensor, settings: list[int], softmax_scale: float, causal: bool,
    format: str, portable: bool, split_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute contiguous gradients of q, k and v.

    A gradient of None counts as 0.
    """
    views, call = _call(q, k, v, settings, softmax_scale, causal, format, portable, split_columns)
    out = last_contiguous(to_bhsd(out, call.spec.format))
    dout = None if dout is None else to_bhsd(dout, call.spec.format)
    plan = None if call.short else launches.plan_of(views[0], views[1], call, projection_seeds, sample_seeds)
    dq, dk, dv = triton_backend.run_backward(*views, out, lse.contiguous(), dout, dlse, plan, call)
    return from_bhsd(dq, call.spec.format), from_bhsd(dk, call.spec.format), from_bhsd(dv, call.spec.format)


@attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    projection_seeds: Tensor, sample_seeds: Tensor, settings: list[int], softmax_scale: float, causal: bool,
    format: str, portable: bool, split_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register_gradients(attend, attend_backward)


def traced(
    q: Tensor, k: Tensor, v: Tensor, settings: HyperSettings, projection_seeds: Tensor, sample_seeds: Tensor,
    spec: AttentionSpec,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the operator as `triton_hyper_attention`."""
    numbers = list(astuple(settings))
    return attend(
        q,
        k,
        v,
        projection_seeds,
        sample_seeds,
        numbers,
        spec.softmax_scale,
        spec.causal,
        spec.format,
        spec.portable,
        spec.split_columns,
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    settings: list[int],
    scale: float,
    causal: bool,
    format: str,
    portable: bool,
    split_columns: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], Call]:
    spec = AttentionSpec(scale, causal, 0, None, cast(Format, format), portable, split_columns)
    qh, kh, vh = (last_contiguous(to_bhsd(x, spec.format)) for x in (q, k, v))
    return (qh, kh, vh), call_of(qh, kh, vh, HyperSettings(*settings), spec)
