"""Tensors past 2^31 elements, and more heads than a grid's second dimension holds."""

import pytest
import torch
from torch import Tensor

from s2train.kernels import BlockLayout, block_sparse_attention, reference_attention

pytestmark = pytest.mark.gpu
GIB = 2**30


@pytest.fixture(autouse=True)
def room() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 75 * GIB:
        pytest.skip("needs a GPU with 80 GB")
    torch.cuda.empty_cache()


def assert_close(x: Tensor, exact: Tensor) -> None:
    """Within what bfloat16 allows: a wrong offset reads other random numbers, and errs by as much as there is."""
    assert (x.double() - exact).norm() < 1e-2 * exact.norm()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def assert_a_batch_entry_is_the_oracles(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, format: str, backend: str
) -> None:
    """Output and gradients of the last batch entry, at the end of all tensors or of each of their rows."""
    dim = 1 if format == "sbhd" else 0
    dout = torch.randn_like(q)
    out, lse = block_sparse_attention(q, k, v, layout, format=format, backend=backend, return_lse=True)  # type: ignore[call-overload]
    grads = torch.autograd.grad(out, (q, k, v), dout)
    for entry in (q.shape[dim] - 1, q.shape[dim] // 2):
        part = [x.detach().narrow(dim, entry, 1).double().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = reference_attention(*part, layout, format=format)  # type: ignore[arg-type]
        exact_grads = torch.autograd.grad(exact, part, dout.narrow(dim, entry, 1).double())
        assert_close(out.narrow(dim, entry, 1), exact)
        assert_close(
            lse[entry : entry + 1].masked_fill(exact_lse == -torch.inf, 0),
            exact_lse.masked_fill(exact_lse == -torch.inf, 0),
        )
        for x, expected in zip(grads, exact_grads, strict=True):
            assert_close(x.narrow(dim, entry, 1), expected)


@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("format", ["sbhd", "bhsd"])
def test_more_than_2_to_the_31_elements(format: str, backend: str) -> None:
    batch, heads, length, dim = 600, 32, 896, 128
    shape = (length, batch, heads, dim) if format == "sbhd" else (batch, heads, length, dim)
    q, k, v = (random(*shape) for _ in range(3))
    assert q.numel() > 2**31
    layout = BlockLayout.from_mask(torch.rand(heads, 7, 7) < 0.5, 128, device="cuda")
    assert_a_batch_entry_is_the_oracles(q, k, v, layout, format, backend)


@pytest.mark.parametrize("backend", ["triton", "portable"])
def test_one_sequence_of_more_than_2_to_the_31_elements(backend: str) -> None:
    heads, length, dim, block = 16, 2**20 + 128, 128, 128
    q, k, v = random(length, 1, heads, dim), random(length, 1, 1, dim), random(length, 1, 1, dim)
    assert q.numel() > 2**31
    i = torch.arange(length // block, device="cuda")
    distance = i[:, None] - i
    pattern = (distance >= 0) & ((distance < 4) | (i % 64 == 0))
    layout = BlockLayout.from_patterns(pattern[None], [0] * heads, block)
    dout = torch.randn_like(q)
    out = block_sparse_attention(q, k, v, layout, backend=backend)  # type: ignore[call-overload]
    (dq,) = torch.autograd.grad(out, q, dout)
    rows = 64
    one_head = layout.heads(0, 1)
    last, keys, values = (x.detach().double() for x in (q[-rows:, :, -1:], k, v))
    exact, _ = reference_attention(last.requires_grad_(), keys, values, one_head, query_offset=length - rows)
    (exact_dq,) = torch.autograd.grad(exact, last, dout[-rows:, :, -1:].double())
    assert_close(out[-rows:, :, -1:], exact)
    assert_close(dq[-rows:, :, -1:], exact_dq)


@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize(("block", "dim"), [(64, 128), (32, 32)])
def test_more_heads_than_65535(block: int, dim: int, backend: str) -> None:
    batch, heads, length = 70, 1024, 64 + 1
    q, k, v = random(batch, heads, length, dim), random(batch, 512, length, dim), random(batch, 512, length, dim)
    assert batch * heads > 65_535
    blocks = -(-length // block)
    layout = BlockLayout.from_mask(torch.rand(heads, blocks, blocks) < 0.8, block, device="cuda")
    assert_a_batch_entry_is_the_oracles(q, k, v, layout, "bhsd", backend)
