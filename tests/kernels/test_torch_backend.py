"""The CPU training path against the oracle."""

import pytest
import torch
from s2train.kernels import block_sparse_attention

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
