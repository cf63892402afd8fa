"""Dense causal attention against an explicit softmax in float64, its error measured by torch's own."""

from dataclasses import dataclass

import pytest
import torch
from s2train.kernels.dense import dense_causal_attention
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    s_q: int
    s_k: int
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    batch: int = 2


CASES = {
    "whole sequence": Case(45, 45),
    "as many KV heads as heads": Case(45, 45, kv_heads=4),
    "one KV head": Case(45, 45, kv_heads=1),
    "last part of the queries": Case(19, 45),
    "last part, as many KV heads": Case(19, 45, kv_heads=4),
    "one query": Case(1, 45),
    "one query, one key": Case(1, 1, batch=32),  # rounding alone, of enough numbers to have a size
}


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v over the keys up to each query's position; [s, b, h, d], all in q's dtype."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * scale
    query, key = torch.arange(q.shape[0], device=q.device), torch.arange(k.shape[0], device=q.device)
    future = key[None, :] > query[:, None] + k.shape[0] - q.shape[0]
    return torch.einsum("bhqk,kbhd->qbhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)


def assert_as_exact_as_torch(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradients err at most twice as much as the explicit softmax in the same dtype."""
    heads = (case.heads, case.kv_heads, case.kv_heads)
    lengths = (case.s_q, case.s_k, case.s_k)
    sizes = [(s, case.batch, h, case.dim) for s, h in zip(lengths, heads, strict=True)]
    inputs = [torch.randn(size, device=device).to(dtype) for size in sizes]
    dout = torch.randn(sizes[0], device=device).to(dtype)
    scale = 0.3

    def results(dtype: torch.dtype, *, is_ours: bool) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        if is_ours:
            out = dense_causal_attention(*leaves, softmax_scale=scale, query_offset=case.s_k - case.s_q)
        else:
            out = explicit(*leaves, scale)
        return out, *torch.autograd.grad(out, leaves, dout.to(dtype))

    exact, plain = results(torch.float64, is_ours=False), results(dtype, is_ours=False)
    for name, x, x64, x_plain in zip(NAMES, results(dtype, is_ours=True), exact, plain, strict=True):
        assert x.dtype == dtype
        error, plain_error = (x.double() - x64).norm(), (x_plain.double() - x64).norm()
        # A float32 result is not blamed for its last bits; with one key dq and dk are nothing else.
        last_bits = 3e-7 * max(x64.norm(), dout.double().norm())
        assert error <= 2 * plain_error + last_bits, f"{name} of {x64.norm():.1e}: {error:.1e}, torch {plain_error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_as_exact_as_an_explicit_softmax(case: str) -> None:
    assert_as_exact_as_torch(CASES[case], torch.float32, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_fused_kernels_are_as_exact_as_an_explicit_softmax(case: str, dtype: torch.dtype) -> None:
    assert_as_exact_as_torch(CASES[case], dtype, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("s_q", "s_k"), [(512, 512), (200, 512)])
def test_heads_of_a_model_are_as_exact_as_an_explicit_softmax(dim: int, s_q: int, s_k: int) -> None:
    assert_as_exact_as_torch(Case(s_q, s_k, heads=8, kv_heads=2, dim=dim), torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize("offset", [0, 25, 27])
def test_queries_that_do_not_end_with_the_keys_are_rejected(offset: int) -> None:
    q, k = torch.randn(19, 1, 2, 8), torch.randn(45, 1, 2, 8)
    with pytest.raises(ValueError, match="26"):
        dense_causal_attention(q, k, k, softmax_scale=1.0, query_offset=offset)
