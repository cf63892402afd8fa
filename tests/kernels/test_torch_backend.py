"""The CPU training path against the oracle."""

from dataclasses import replace

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.spec import AttentionSpec
from s2train.kernels.torch_backend import torch_attention, torch_gradients

from tests.kernels.cases import Problem, assert_as_exact_as_torch

BOUNDS = torch.tensor([0, 37, 37, 101, 130], dtype=torch.int32)
CASES = {
    "gqa": Problem(heads=4, kv_heads=2, s_q=100, s_k=100, batch=2),
    "bfloat16": Problem(dtype=torch.bfloat16, s_q=100, s_k=100),
    "bhsd": Problem(options={"format": "bhsd"}),
    "offset": Problem(s_q=50, s_k=120, options={"query_offset": 70}),
    "not_causal": Problem(s_q=50, s_k=75, options={"causal": False}),
    "packed": Problem(s_q=130, s_k=130, options={"cu_seqlens": BOUNDS}),
    "empty_rows": Problem(s_q=150, s_k=150, keep=0.2),
}


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_with_lse_as_exact_as_torch(problem: Problem) -> None:
    assert_as_exact_as_torch(problem, "torch", torch.device("cpu"))


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_fast_path_agrees_with_the_path_that_returns_lse(problem: Problem) -> None:
    inputs, layout, dout, _ = problem.make(torch.device("cpu"))
    fast = block_sparse_attention(*inputs, layout, **problem.options)
    slow, _ = block_sparse_attention(*inputs, layout, return_lse=True, **problem.options)
    tolerance = {"rtol": 0.05, "atol": 0.05} if problem.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    assert fast.is_contiguous()
    torch.testing.assert_close(fast, slow, **tolerance)
    for a, b in zip(torch.autograd.grad(fast, inputs, dout), torch.autograd.grad(slow, inputs, dout), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_calls_of_another_shape_do_not_reuse_a_mask() -> None:
    (q, k, v), layout, _, _ = Problem(s_q=96, s_k=96).make(torch.device("cpu"))
    for length in (96, 40, 96, 95):
        for causal in (True, False):
            args = (q[:length], k[:length], v[:length], layout)
            fast = block_sparse_attention(*args, causal=causal)
            slow, _ = block_sparse_attention(*args, causal=causal, return_lse=True)
            torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_training_follows_a_call_in_inference_mode() -> None:
    inputs, layout, dout, _ = Problem(s_q=40, s_k=40).make(torch.device("cpu"))
    with torch.inference_mode():
        expected = block_sparse_attention(*inputs, layout)
    out = block_sparse_attention(*inputs, layout)
    out.backward(dout)
    assert out.equal(expected)


def test_gradcheck_in_float64_through_output_and_log_sum_exp() -> None:
    (q, k, v), _, _, _ = Problem(heads=2, kv_heads=1, s_q=7, s_k=20, dim=3, v_dim=2, dtype=torch.float64).make(
        torch.device("cpu")
    )
    mask = torch.rand(2, 2, 2) < 0.6
    mask[0, 1] = False  # rows without a key
    layout = BlockLayout.from_mask(mask, 16)

    def attend(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = block_sparse_attention(*qkv, layout, query_offset=13, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, layout, query_offset=13), (q, k, v))


@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_gradient_formulas_are_autograds(problem: Problem) -> None:
    problem = replace(problem, dtype=torch.float64)
    inputs, layout, dout, dlse = problem.make(torch.device("cpu"))
    spec = AttentionSpec(
        0.3, **({"causal": True, "query_offset": 0, "cu_seqlens": None, "format": "sbhd"} | problem.options)
    )
    out, lse = torch_attention(*inputs, layout, spec, with_lse=True)
    assert lse is not None
    finite = lse.masked_fill(lse == -torch.inf, 0)
    dlse = dlse.double()
    for given in ((dout, dlse), (dout, None), (None, dlse)):
        loss = sum(
            ((x * dx).sum() for x, dx in zip((out, finite), given, strict=True) if dx is not None), out.new_zeros(())
        )
        expected = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
        for a, b in zip(torch_gradients(*inputs, *given, layout, spec), expected, strict=True):
            torch.testing.assert_close(a, b)
