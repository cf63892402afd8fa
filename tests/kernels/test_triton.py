"""The Triton kernels against the oracle: interpreted without a GPU, compiled with one."""

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention, reference_attention
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import Problem, assert_as_exact_as_torch

BOUNDS = torch.tensor([0, 37, 37, 101, 130], dtype=torch.int32)  # documents of 37, 0, 64 and 29 tokens
CASES = {
    "mha": Problem(heads=2, kv_heads=2),
    "gqa": Problem(heads=4, kv_heads=2, s_q=100, s_k=100),
    "mqa": Problem(heads=3, kv_heads=1),
    "batch": Problem(batch=3, s_q=40, s_k=40),
    # A number near 0 has no bounded error relative to itself: sixteen of them share their norm.
    "one_token": Problem(batch=8, s_q=1, s_k=1, dout_scale=0.1, keep=1.0),
    "block_16": Problem(block=16),
    "block_64": Problem(block=64, s_q=130, s_k=130),
    "block_larger_than_tiles": Problem(block=64, s_q=130, s_k=130, keep=1.0),
    "block_128": Problem(block=128, s_q=150, s_k=150),
    "block_256": Problem(block=256, s_q=300, s_k=300),
    "tiles_of_half_a_block": Problem(block=128, s_q=200, s_k=200, dtype=torch.bfloat16),
    "head_dim_32": Problem(dim=32),
    "head_dim_80": Problem(dim=80),
    "head_dim_8": Problem(dim=8),
    "head_dim_33": Problem(dim=33, v_dim=33),
    "head_dim_96": Problem(dim=96, dtype=torch.bfloat16),
    "head_dim_256": Problem(dim=256, s_q=40, s_k=40),
    "v_dim_differs": Problem(dim=32, v_dim=16),
    "v_dim_larger_and_odd": Problem(dim=20, v_dim=37),
    "bfloat16": Problem(dtype=torch.bfloat16, s_q=100, s_k=100),
    "bfloat16_gqa_block_64": Problem(dtype=torch.bfloat16, heads=4, kv_heads=2, block=64, s_q=130, s_k=130),
    "float16": Problem(dtype=torch.float16),
    "bshd": Problem(batch=2, options={"format": "bshd"}),
    "bhsd": Problem(batch=2, options={"format": "bhsd"}),
    "scale": Problem(options={"softmax_scale": 0.5}),
    "not_causal": Problem(s_q=100, s_k=75, options={"causal": False}),
    "offset": Problem(s_q=50, s_k=120, options={"query_offset": 70}),
    "offset_aligned": Problem(s_q=32, s_k=96, options={"query_offset": 32}),
    "offset_within_one_block": Problem(s_q=5, s_k=90, options={"query_offset": 70}),
    "offset_beyond_keys": Problem(s_q=50, s_k=40, options={"query_offset": 70}),
    "offset_not_causal": Problem(s_q=50, s_k=90, options={"query_offset": 37, "causal": False}),
    "offset_gqa_block_64": Problem(heads=4, kv_heads=2, block=64, s_q=70, s_k=150, options={"query_offset": 45}),
    "packed": Problem(s_q=130, s_k=130, options={"cu_seqlens": BOUNDS}),
    "packed_gqa": Problem(heads=4, s_q=130, s_k=130, block=16, options={"cu_seqlens": BOUNDS}),
    "packed_not_causal": Problem(s_q=130, s_k=130, options={"cu_seqlens": BOUNDS, "causal": False}),
    "sparse_with_empty_rows": Problem(s_q=150, s_k=150, keep=0.2),
    "masks_of_each_sequence": Problem(batch=2, heads=4, kv_heads=2, s_q=70, s_k=70, layout="static batch"),
    "masks_of_one_sequence": Problem(s_q=100, s_k=100, layout="static batch"),
    "top_k": Problem(s_q=100, s_k=100, layout="top-k"),
    "top_k_of_each_sequence": Problem(batch=2, heads=4, kv_heads=2, s_q=70, s_k=70, layout="top-k"),
    "top_k_shared": Problem(batch=2, heads=4, kv_heads=2, s_q=60, s_k=60, block=16, layout="top-k shared"),
    "top_k_with_empty_rows": Problem(heads=3, kv_heads=1, s_q=150, s_k=150, keep=0.15, layout="top-k shared"),
    "top_k_not_causal": Problem(s_q=100, s_k=75, layout="top-k", options={"causal": False}),
    "top_k_offset": Problem(batch=2, s_q=50, s_k=90, layout="top-k", options={"query_offset": 37}),
    "top_k_bfloat16_block_64": Problem(
        heads=4, s_q=130, s_k=130, block=64, dtype=torch.bfloat16, layout="top-k shared"
    ),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_output_lse_and_gradients_are_as_exact_as_torch(problem: Problem, device: torch.device) -> None:
    if "cu_seqlens" in problem.options:
        problem.options["cu_seqlens"] = problem.options["cu_seqlens"].to(device)
    assert_as_exact_as_torch(problem, "triton", device)


@pytest.mark.usefixtures("poisoned")
def test_heads_of_a_group_may_share_a_pattern(device: torch.device) -> None:
    inputs, _, dout, dlse = Problem(heads=4, kv_heads=2).make(device)
    patterns = torch.rand(2, 2, 2) < 0.7
    results = []
    for layout in (
        BlockLayout.from_patterns(patterns, [0, 0, 1, 0], 32, device=device),
        BlockLayout.from_patterns(patterns[[0, 0, 1, 0]], range(4), 32, device=device),
    ):
        out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend="portable")
        results.append((out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse))))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_gradients_are_bitwise_the_same_in_every_run(device: torch.device) -> None:
    inputs, layout, dout, dlse = Problem(heads=4, kv_heads=2, s_q=70, s_k=70).make(device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend="triton")
            runs.append((out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("poisoned")
def test_gradients_without_lse_gradient(device: torch.device) -> None:
    assert_as_exact_as_torch(Problem(), "triton", device, lse_gradient=False)


@pytest.mark.usefixtures("poisoned")
def test_lse_gradient_alone(device: torch.device) -> None:
    (q, k, v), layout, _, dlse = Problem(keep=1.0).make(device)
    lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")[1]
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse)
    expected = block_sparse_attention(q, k, v, layout, return_lse=True, backend="torch")[1]
    dq_expected, dk_expected = torch.autograd.grad(expected, (q, k), dlse)
    torch.testing.assert_close(dq, dq_expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dk, dk_expected, rtol=1e-4, atol=1e-5)
    assert not dv.any()


@pytest.mark.usefixtures("poisoned")
def test_rows_without_keys_are_zero_and_take_any_lse_gradient(device: torch.device) -> None:
    (q, k, v), _, dout, dlse = Problem(s_q=64, s_k=64).make(device)
    mask = torch.tensor([[[False, False], [True, False]], [[False, True], [False, False]]])
    layout = BlockLayout.from_mask(mask, 32, device=device)
    out, lse = block_sparse_attention(q, k, v, layout, return_lse=True, backend="triton")
    # head 0 keeps a block for its second half alone; head 1 only one that causality hides
    empty = torch.zeros(1, 2, 64, dtype=torch.bool, device=device)
    empty[:, 0, :32] = empty[:, 1] = True
    assert (lse == -torch.inf).equal(empty)
    assert not out.permute(1, 2, 0, 3)[empty].any()
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse.masked_fill(empty, torch.nan)))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0].permute(1, 2, 0, 3)[empty].any()


@pytest.mark.usefixtures("poisoned")
def test_a_layout_longer_than_the_sequence_changes_nothing(device: torch.device) -> None:
    (q, k, v), _, dout, _ = Problem(s_q=50, s_k=50).make(device)
    mask = torch.ones(2, 5, 5, dtype=torch.bool)
    results = []
    for size in (2, 5):
        layout = BlockLayout.from_mask(mask[:, :size, :size], 32, device=device)
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        results.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("poisoned")
def test_strided_inputs_give_the_same_as_contiguous_ones(device: torch.device) -> None:
    heads, dim, s = 2, 16, 50
    layout = BlockLayout.from_mask(torch.rand(heads, 2, 2) < 0.8, 32, device=device)
    mixed = torch.randn(s, 2, heads, 3 * dim, device=device)  # q, k, v interleaved, as a fused projection has them
    views = mixed.split(dim, -1)
    backwards = torch.randn(s, 2, dim, heads, device=device).mT  # the last dimension strided
    for q, k, v in (views, (views[0], backwards, views[2])):
        out = block_sparse_attention(q, k, v, layout, backend="triton")
        expected = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), layout, backend="triton")
        assert out.equal(expected)
        assert not out.isnan().any()


def test_expanded_output_gradient(device: torch.device) -> None:
    (q, k, v), layout, _, _ = Problem(keep=1.0).make(device)
    out = block_sparse_attention(q, k, v, layout, backend="triton")
    (by_sum,) = torch.autograd.grad(out.sum(), v, retain_graph=True)
    (by_ones,) = torch.autograd.grad(out, v, torch.ones_like(out).contiguous())
    assert by_sum.equal(by_ones)


def test_activation_checkpointing_without_reentrance(device: torch.device) -> None:
    (q, k, v), layout, dout, _ = Problem().make(device)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return block_sparse_attention(*qkv, layout, backend="triton")

    plain = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    again = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False), (q, k, v), dout)
    assert all(a.equal(b) for a, b in zip(plain, again, strict=True))


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_long_sequences_on_a_gpu(dtype: torch.dtype, block: int, device: torch.device) -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=block, dtype=dtype, keep=0.3)
    assert_as_exact_as_torch(problem, "triton", device)


@pytest.mark.gpu
def test_float32_is_exact_where_torch_may_use_tf32(device: torch.device) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    problem = Problem(heads=4, kv_heads=2, s_q=500, s_k=500, dim=128, block=64)
    inputs, layout, dout, _ = problem.make(device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = reference_attention(*exact, layout)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        out = block_sparse_attention(*inputs, layout)
        grads = torch.autograd.grad(out, inputs, dout)
        plain = [x.detach().requires_grad_() for x in inputs]
        rough, _ = reference_attention(*plain, layout)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert (rough - expected).norm() > 1e-4 * expected.norm()  # what TF32 would give: this test would fail
    for x, x64 in zip((out, *grads), (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True):
        assert (x - x64).norm() < 5e-6 * x64.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("block", [64, 128])
def test_deterministic_gradients_on_a_gpu(block: int, backend: str, device: torch.device) -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=4000, s_k=4000, dim=128, block=block, dtype=torch.bfloat16)
    inputs, layout, dout, dlse = problem.make(device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(4):
            out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend=backend)
            runs.append((out, lse, *torch.autograd.grad((out, lse), inputs, (dout, dlse))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))
