"""SwiGLU in place, by Liger-Kernel's kernels, launched at less host cost."""

from typing import Any

import torch
from liger_kernel.ops.swiglu import _swiglu_fused_gate_up_backward_kernel, _swiglu_fused_gate_up_forward_kernel
from liger_kernel.ops.utils import calculate_settings
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.kernels.launch import Launcher

_launch_forward = Launcher(_swiglu_fused_gate_up_forward_kernel)
_launch_backward = Launcher(_swiglu_fused_gate_up_backward_kernel)


class _SwiGLUInPlace(torch.autograd.Function):
    """Liger-Kernel's `LigerFusedGateUpSiLUMulFunction` in place, bit for bit."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        block, warps = calculate_settings(width)
        rows = out.numel() // width
        _launch_forward((rows, 1, 1), (gate_up, out, 2 * width, width, width, block), num_warps=warps)
        ctx.save_for_backward(gate_up)
        ctx.overwritten = False
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        if ctx.overwritten:
            raise RuntimeError("SwiGLU's backward can run once: it overwrites its input")
        ctx.overwritten = True
        (gate_up,) = ctx.saved_tensors
        gate_up = gate_up.detach()
        width = dout.shape[-1]
        block, warps = calculate_settings(width)
        rows = dout.numel() // width
        arguments = (dout.contiguous(), gate_up, gate_up, 2 * width, width, width, block)
        _launch_backward((rows, 1, 1), arguments, num_warps=warps)
        return gate_up


def swiglu_in_place(gate_up: Tensor) -> Tensor:
    """Multiply SiLU of the first half by the second half.

    Halves are of the last dimension: [s, b, 2 f] to [s, b, f]. The backward overwrites `gate_up` with the gradient.
    """
    out: Tensor = _SwiGLUInPlace.apply(gate_up)
    return out
