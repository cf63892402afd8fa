"""Every format is read and written by strides: nothing of q's size is copied on the way."""

from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.spec import FORMATS, from_bhsd
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, HEADS, LENGTH, DIM, BLOCK = 2, 4, 50, 16, 32


class Copies(TorchDispatchMode):
    """Counts copies of floating-point tensors as large as k or larger."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ("aten::clone", "aten::_to_copy", "aten::copy_", "aten::contiguous"):
            self.found += result.is_floating_point() and result.numel() >= self.size
        return result


def formatted(format: str, heads: int, device: torch.device, fused: int = 1) -> Tensor:
    return from_bhsd(torch.randn(BATCH, heads, LENGTH, fused * DIM, device=device), format).contiguous()  # type: ignore[arg-type]


# Megatron gives views of a fused projection in sbhd; `make test-all` adds the other pairs.
@pytest.mark.parametrize(
    ("format", "fused"),
    [
        pytest.param(format, fused, marks=[] if fused == (format != "bshd") else pytest.mark.long)
        for format in FORMATS
        for fused in (False, True)
    ],
)
def test_no_tensor_is_copied(format: str, fused: bool, device: torch.device) -> None:
    if fused:
        leaves: tuple[Tensor, ...] = formatted(format, HEADS, device, fused=3).split(DIM, -1)
    else:
        leaves = tuple(formatted(format, heads, device) for heads in (HEADS, 2, 2))
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    layout = BlockLayout.from_mask(torch.rand(HEADS, 2, 2) < 0.8, BLOCK, device=device)
    dout = torch.randn_like(formatted(format, HEADS, device))
    with Copies(k.numel()) as copies:
        out = block_sparse_attention(q, k, v, layout, format=format, backend="triton")  # type: ignore[call-overload]
        out.backward(dout)
    assert copies.found == 0
    assert out.is_contiguous()
    assert all(x.grad is not None and x.grad.is_contiguous() for x in (q, k, v))


def test_a_strided_last_dimension_is_copied_and_seen_to_be(device: torch.device) -> None:
    q = formatted("bhsd", HEADS, device)
    backwards = formatted("bhsd", HEADS, device).mT.contiguous().mT
    layout = BlockLayout.from_mask(torch.ones(HEADS, 2, 2) > 0, BLOCK, device=device)
    with Copies(q.numel()) as copies:
        block_sparse_attention(q, backwards, q, layout, format="bhsd", backend="triton")
    assert copies.found == 1


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_peak_memory_holds_no_copy(format: str, device: torch.device) -> None:
    length, heads = 8192, 8
    mixed = from_bhsd(torch.randn(1, heads, length, 3 * 128, device=device, dtype=torch.bfloat16), format)  # type: ignore[arg-type]
    q, k, v = mixed.contiguous().split(128, -1)
    layout = BlockLayout.from_mask(torch.rand(heads, 64, 64) < 0.3, 128, device=device)
    for _ in range(2):  # the first call compiles, and builds what the layout keeps
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = block_sparse_attention(q, k, v, layout, format=format)  # type: ignore[call-overload]
        peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.5 * out.nbytes
