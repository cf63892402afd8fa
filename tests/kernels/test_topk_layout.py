"""Layouts of top-k lists: what they keep, what they reject, and that the kernels walk just that."""

import contextlib
import gc
import itertools
from typing import Any

import pytest
import torch
from s2train.kernels import Backend, BlockLayout, TopKLayout, block_sparse_attention
from s2train.kernels.check import run_time
from s2train.kernels.check.run_time import fresh_steps, is_nothing, random_indices
from s2train.kernels.topk_lists import kept_columns, kept_rows

from tests.kernels.cases import LayoutKind, Problem, gradients


def lists(offsets: torch.Tensor, members: torch.Tensor) -> list[list[int]]:
    return [members[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]


def test_mask_keeps_the_blocks_that_a_list_names() -> None:
    indices = torch.tensor([[[[2, -1, 0], [-1, -1, -1]]]], dtype=torch.int32)
    layout = TopKLayout.from_indices(indices, 16, num_heads=2, num_key_blocks=3)
    expected = torch.tensor([[True, False, True], [False, False, False]])
    assert layout.mask().equal(expected.expand(1, 2, 2, 3))  # both heads share the list


def test_a_block_that_is_named_twice_counts_once() -> None:
    indices = torch.tensor([[[[1, 0, 1, 1]]]], dtype=torch.int32)
    assert lists(*kept_rows(indices, 2)) == [[0, 1]]
    assert lists(*kept_columns(indices, 2)) == [[0], [0]]


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_rows_and_columns_are_those_of_the_same_mask(keep: float) -> None:
    layout = TopKLayout.from_indices(random_indices(2, 3, 7, 5, keep), 16, num_heads=3, num_key_blocks=5)
    mask = layout.mask().flatten(0, 1)
    assert lists(layout.row_offsets, layout.row_columns) == [
        row.nonzero().flatten().tolist() for row in mask.flatten(0, 1)
    ]
    assert lists(layout.column_offsets, layout.column_rows) == [
        column.nonzero().flatten().tolist() for column in mask.mT.flatten(0, 1)
    ]


def test_lists_are_built_without_a_look_at_their_values() -> None:
    indices = torch.empty(1, 8, 256, 16, dtype=torch.int32, device="meta")  # has no values to look at
    layout = TopKLayout.from_indices(indices, 128, num_heads=32)
    assert layout.row_columns.shape == layout.column_rows.shape == (8 * 256 * 16,)
    assert layout.row_offsets.shape == layout.column_offsets.shape == (8 * 256 + 1,)
    assert layout.columns_by_work(8).shape == (8 * 256,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("backend", "shared"),
    [
        ("torch", False),
        ("portable", True),
        *(pytest.param(*x, marks=pytest.mark.long) for x in (("torch", True), ("portable", False))),
    ],
)
def test_results_are_those_of_the_same_mask_given_statically(backend: str, shared: bool, device: torch.device) -> None:
    problem = Problem(
        heads=4, kv_heads=2, s_q=90, s_k=90, batch=2, keep=0.4, layout="top-k shared" if shared else "top-k"
    )
    inputs, layout, dout, dlse = problem.make(device)
    results = []
    for given in (layout, BlockLayout.from_mask(layout.mask(), 32)):
        out, lse = block_sparse_attention(*inputs, given, return_lse=True, backend=backend)
        results.append(gradients(out, lse, inputs, dout, dlse))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "portable"])
def test_a_causal_call_hides_later_blocks_that_a_list_names(backend: str, device: torch.device) -> None:
    (q, k, v), _, _, _ = Problem(s_q=64, s_k=64).make(device)
    later = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device).expand(1, 2, 2, 2)
    none_later = torch.tensor([[0, -1], [1, 0]], dtype=torch.int32, device=device).expand(1, 2, 2, 2)
    outs = [
        block_sparse_attention(q, k, v, TopKLayout.from_indices(x, 32, num_heads=2), backend=backend)
        for x in (later, none_later)
    ]
    assert outs[0].equal(outs[1])


@pytest.mark.parametrize("backend", ["torch", "portable"])
def test_a_later_token_changes_no_earlier_output(backend: str, device: torch.device) -> None:
    (q, k, v), layout, _, _ = Problem(s_q=90, s_k=90, keep=0.8, layout="top-k").make(device)
    token = 50
    before = block_sparse_attention(q, k, v, layout, backend=backend)
    with torch.no_grad():
        for x in (q, k, v):
            x[token:] = torch.randn_like(x[token:])
    after = block_sparse_attention(q, k, v, layout, backend=backend)
    assert after[:token].equal(before[:token])
    assert not after[token:].equal(before[token:])


@pytest.mark.parametrize("value", [-2, 3, 2**32, 2**32 - 1, -(2**32)])
def test_indices_that_are_no_key_block_are_rejected_on_a_cpu(value: int) -> None:
    (q, k, v), _, _, _ = Problem(s_q=90, s_k=90).make(torch.device("cpu"))
    indices = torch.full((1, 2, 3, 2), value, dtype=torch.int32 if -2 <= value <= 3 else torch.int64)
    layout = TopKLayout.from_indices(indices, 32, num_heads=2)
    with pytest.raises(ValueError, match="key blocks below 3"):
        block_sparse_attention(q, k, v, layout)


INDICES = torch.zeros(1, 2, 3, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "telling"),
    [
        ({"indices": INDICES.float()}, "int32 or int64"),
        ({"indices": INDICES[0]}, "query blocks, k"),
        ({"indices": INDICES[..., :0]}, "at least 1"),
        ({"num_heads": 3}, "2 lists a query block for 3 heads"),
        ({"num_heads": 0}, "2 lists a query block for 0 heads"),
        ({"block_size": 48}, "block_size"),
        ({"num_key_blocks": 0}, "num_key_blocks"),
    ],
)
def test_indices_that_make_no_layout_are_rejected(change: dict[str, Any], telling: str) -> None:
    fine = {"indices": INDICES, "block_size": 16, "num_heads": 2}
    assert TopKLayout.from_indices(**fine).num_key_blocks == 3
    with pytest.raises(ValueError, match=telling):
        TopKLayout.from_indices(**(fine | change))


@pytest.mark.parametrize(
    ("problem", "indices", "options", "telling"),
    [
        (Problem(heads=4, kv_heads=4), INDICES, {}, "each head, or each KV head, a list"),
        (Problem(heads=2), INDICES, {}, "2 heads"),
        (Problem(heads=4, kv_heads=2, batch=2), INDICES, {}, "v have 2 sequences"),
        (Problem(heads=4, kv_heads=2, batch=2), INDICES.expand(3, 2, 3, 2), {}, "3 sequences"),
        (Problem(heads=4, kv_heads=2, s_q=97, s_k=90), INDICES, {}, "too small"),
        (Problem(heads=4, kv_heads=2), INDICES, {"cu_seqlens": torch.tensor([0, 63])}, "takes a BlockLayout"),
    ],
)
def test_layouts_that_do_not_fit_a_call_are_rejected(
    problem: Problem, indices: torch.Tensor, options: dict[str, Any], telling: str
) -> None:
    (q, k, v), _, _, _ = problem.make(torch.device("cpu"))
    with pytest.raises(ValueError, match=telling):
        block_sparse_attention(q, k, v, TopKLayout.from_indices(indices, 32, num_heads=4), **options)


def test_indices_written_to_before_the_backward_are_an_error(device: torch.device) -> None:
    inputs, layout, dout, _ = Problem(layout="top-k").make(device)
    out = block_sparse_attention(*inputs, layout, backend="portable")
    layout.indices.fill_(-1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.backward(dout)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize("backend", ["torch", "portable"])
def test_indices_written_to_between_calls_are_read_again(backend: Backend, mode: Any, device: torch.device) -> None:
    with mode():
        (q, k, v), layout, _, _ = Problem(layout="top-k").make(device)
        assert block_sparse_attention(q, k, v, layout, backend=backend).any()
        layout.indices.fill_(-1)
        assert not block_sparse_attention(q, k, v, layout, backend=backend).any()


def test_a_thousand_layouts_leave_nothing_behind(device: torch.device) -> None:
    inputs, layout, _, _ = Problem(s_q=33, s_k=33, layout="top-k").make(device)
    gc.collect()  # layouts of earlier tests
    left = fresh_steps(inputs, layout, {}, 0.5, 1000, backend="torch")
    assert left["steps"] == 1000
    assert run_time.is_nothing(left)


def test_what_steps_leave_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layout, _, _ = Problem(s_q=33, s_k=33, layout="top-k").make(torch.device("cpu"))
    kept = []

    def leaving(*arguments: Any, **options: Any) -> torch.Tensor:
        kept.append(BlockLayout.from_mask(torch.ones(2, 2, 2) > 0, 32))
        return block_sparse_attention(*arguments, **options)

    monkeypatch.setattr(run_time, "block_sparse_attention", leaving)
    assert fresh_steps(inputs, layout, {}, 0.5, 4, backend="torch")["registered"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "portable", "torch"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layout", ["top-k", "top-k shared"])
def test_a_thousand_steps_on_a_gpu_never_wait_nor_compile(layout: LayoutKind, block: int, backend: Backend) -> None:
    problem = Problem(
        heads=8, kv_heads=2, batch=2, s_q=1000, s_k=1000, dim=128, block=block, dtype=torch.bfloat16, layout=layout
    )
    inputs, first, _, _ = problem.make(torch.device("cuda"))
    left = fresh_steps(inputs, first, {}, 0.4, 1000 if backend != "torch" else 20, backend=backend)
    assert is_nothing(left), left


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_a_replayed_graph_reads_the_indices_that_are_there(block: int) -> None:
    problem = Problem(
        heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=block, dtype=torch.bfloat16, layout="top-k shared"
    )
    inputs, layout, dout, _ = problem.make(torch.device("cuda"))

    def step() -> tuple[torch.Tensor, ...]:
        out = block_sparse_attention(*inputs, layout)
        return out, *torch.autograd.grad(out, inputs, dout)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for _ in range(2):
        layout.indices.copy_(random_indices(*layout.indices.shape[:3], layout.num_key_blocks, 0.4))
        graph.replay()
        for a, b in zip(replayed, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
