"""The Triton kernels as one differentiable function."""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .backward import backward
from .call import Call, keep, strides_of
from .forward import forward
from .hopper.support import backward_choice, kernel_choice
from .interpreter import repair_interpreter
from .saved import NAMES, as_saved, properties
from .spec import AttentionSpec, from_bhsd, to_bhsd
from .tiles import last_contiguous
from .topk_layout import Layout, TopKLayout

if os.environ.get("TRITON_INTERPRET") == "1":
    repair_interpreter()


class _TritonAttention(torch.autograd.Function):
    """The kernels' forward and backward for autograd.

    Maps q, k, v to the output, all in the call's format, and to the log-sum-exp [b, h, s].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, call: Call) -> tuple[Tensor, Tensor]:
        q, k, v = last_contiguous(q), last_contiguous(k), last_contiguous(v)
        out, lse = _forward(q, k, v, layout, call)
        # save indices too, so that autograd detects writes to them before the backward
        indices = layout.indices if isinstance(layout, TopKLayout) else None
        ctx.save_for_backward(q, k, v, out, lse, indices)
        if call.saved is None:
            call.saved = properties(q, k, v, out, lse)
        ctx.layout, ctx.call = layout, call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # gradients with a graph (create_graph) are marked as not differentiable, which takes time
        differentiate = _differentiate_once if torch.is_grad_enabled() else _differentiate
        return differentiate(ctx, dout, dlse)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    # read once: non-reentrant checkpointing recomputes at the first read and rejects a second
    *saved, _ = ctx.saved_tensors
    if dout is None and dlse is None:
        return None, None, None, None, None
    call: Call = ctx.call
    if properties(*saved) != call.saved:
        assert call.saved is not None
        saved = as_saved(saved, NAMES, call.saved)
    q, k, v, out, lse = saved
    return *run_gradients(q, k, v, out, lse, dout, dlse, ctx.layout, call), None, None


_differentiate_once = once_differentiable(_differentiate)


def triton_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, call: Call) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp, both differentiable.

    The output is in the call's format, the log-sum-exp float32 [b, h, s_q].
    """
    if _is_recorded(q, k, v):
        out, lse = _TritonAttention.apply(q, k, v, layout, call)
        return out, lse
    return _forward(last_contiguous(q), last_contiguous(k), last_contiguous(v), layout, call)


def _is_recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether autograd must see the call, which takes time.

    It also must in forward mode, for its error.
    """
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, call: Call) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp; repeat an earlier launch if possible."""
    if call.forward is not None:
        found: tuple[Tensor, Tensor] | None = call.forward(q, k, v)
        if found is not None:
            return found
    format = call.spec.format
    keep_it = functools.partial(setattr, call, "forward") if call.found_again and call.forward is None else None
    q, k, v = (to_bhsd(x, format) for x in (q, k, v))
    out, lse = run_forward(q, k, v, layout, call.spec, keep_it)
    return from_bhsd(out, format), lse


def run_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    layout: Layout, call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients in the call's format; repeat earlier launches if possible."""
    keep_it = None
    # without a launch to repeat in the forward, there is none here
    if call.forward is not None and dout is not None and not torch.are_deterministic_algorithms_enabled():
        # as the launches get them: a copy of an expanded or transposed gradient, not its address
        dout, dlse = last_contiguous(dout), None if dlse is None else dlse.contiguous()
        key = (strides_of(q, k, v, out, lse, dout), dlse is None)
        repeated = call.backward.get(key)
        found: tuple[Tensor, Tensor, Tensor] | None
        if repeated is None:
            keep_it = functools.partial(keep, call.backward, key)
        elif (found := repeated(q, k, v, out, lse, dout, dlse)) is not None:
            return found
    format = call.spec.format
    q, k, v, out = (to_bhsd(x, format) for x in (q, k, v, out))
    dout = None if dout is None else to_bhsd(dout, format)
    dq, dk, dv = run_backward(q, k, v, out, lse, dout, dlse, layout, call.spec, keep_it)
    return from_bhsd(dq, format), from_bhsd(dk, format), from_bhsd(dv, format)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, spec: AttentionSpec,
    keep_launch: Callable[[Any], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute output [b, h, s_q, d_v] and log-sum-exp.

    The arguments decide which kernels run. Inputs are views [b, h, s, d] with stride 1 along d. `keep_launch` gets a
    launch that later calls can repeat, if there is one.
    """
    if not spec.portable and kernel_choice(q, k, v, layout, spec) == "hopper":
        # imported here so that other GPUs need no Gluon
        from .hopper.forward import hopper_forward

        return hopper_forward(q, k, v, layout, spec, keep=keep_launch)
    return forward(q, k, v, layout, spec)


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    layout: Layout, spec: AttentionSpec, keep_launches: Callable[[Any], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute gradients of q, k and v.

    Takes `run_forward`'s results and their gradients. A gradient of None counts as 0. `keep_launches` gets launches
    that later calls can repeat, if there are any.
    """
    dout = torch.zeros_like(out) if dout is None else last_contiguous(dout)
    dlse = None if dlse is None else dlse.contiguous()
    arguments = (q, k, v, out, lse, dout, dlse, layout, spec)
    if not spec.portable and backward_choice(q, k, v, layout, spec) == "hopper":
        from .hopper.backward import hopper_backward

        return hopper_backward(*arguments, keep=keep_launches)
    return backward(*arguments)
