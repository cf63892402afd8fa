"""Weight gradients are added to fp32 buffers within the product, by torch if apex is not installed."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.tensor_parallel import layers
from s2train.kernels.relative_error import relative_error

from s2train.megatron.gradient_sums import replace_apex


@pytest.fixture
def without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", None, raising=False)
    replace_apex()


def error(dtype: torch.dtype, device: str) -> float:
    """Of the sum of a buffer and a product of 257 rows, against float64."""
    inputs, doutputs = (torch.randn(257, width, device=device).to(dtype) for width in (48, 40))
    gradient = torch.randn(40, 48, device=device)
    expected = gradient.double() + doutputs.double().t() @ inputs.double()
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, doutputs, gradient)
    return relative_error(gradient, expected)


@pytest.mark.usefixtures("without_apex")
def test_fp32_products_are_added() -> None:
    assert layers._grad_accum_fusion_available
    assert error(torch.float32, "cpu") < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch adds products of another dtype on GPUs only")
@pytest.mark.usefixtures("without_apex")
def test_bf16_products_are_not_rounded_before_they_are_added() -> None:
    assert error(torch.bfloat16, "cuda") < 1e-5  # rounded products would be 1e-3 off


def test_apexs_kernel_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = SimpleNamespace()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    replace_apex()
    assert layers.fused_weight_gradient_mlp_cuda is apex
