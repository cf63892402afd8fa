"""Add weight gradients to fp32 buffers within the product, by torch.

Megatron does so with a kernel of apex. Apart, the product is rounded to bf16, and another kernel adds it: 10 more bytes
a weight and micro batch.
"""

from types import SimpleNamespace

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def _add_product(inputs: Tensor, doutputs: Tensor, gradient: Tensor) -> None:
    """Add doutputs^T inputs to an fp32 gradient.

    inputs are [n, in], doutputs [n, out], the gradient [out, in].
    """
    if inputs.dtype == gradient.dtype:
        torch.addmm(gradient, doutputs.t(), inputs, out=gradient)
    else:
        torch.addmm(gradient, doutputs.t(), inputs, torch.float32, out=gradient)


def replace_apex() -> None:
    """Give Megatron's linear layers torch's product instead of apex's.

    If apex's kernel is installed, it stays.
    """
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_product)
        layers._grad_accum_fusion_available = True


def add_weight_gradient(gradient: Tensor, inputs: Tensor, doutputs: Tensor) -> None:
    """Add doutputs^T inputs to an fp32 gradient, as Megatron's linear layers do.

    inputs are [n, in], doutputs [n, out], the gradient [out, in].
    """
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, doutputs, gradient)
