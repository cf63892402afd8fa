"""torch.compile takes the op whole, and what comes out is what eager calls give."""

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, Layout, TopKLayout, attention, block_sparse_attention
from s2train.kernels.check.run_time import random_indices
from s2train.kernels.custom_op import attend, attend_backward, layout_arguments
from s2train.kernels.handles import registered
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import LayoutKind, Problem

CASES = {
    "gqa": Problem(heads=4, kv_heads=2, s_q=50, s_k=50),
    "bhsd": Problem(batch=2, s_q=40, s_k=40, options={"format": "bhsd"}),
    "offset, v_dim differs": Problem(s_q=20, s_k=50, v_dim=24, options={"query_offset": 30}),
    "not causal": Problem(s_q=30, s_k=50, options={"causal": False}),
    "empty rows": Problem(s_q=90, s_k=90, keep=0.2),
    "masks of each sequence": Problem(batch=2, s_q=50, s_k=50, layout="static batch"),
    "top-k": Problem(heads=4, kv_heads=2, batch=2, s_q=50, s_k=50, layout="top-k shared"),
    "packed": Problem(s_q=50, s_k=50, options={"cu_seqlens": torch.tensor([0, 17, 17, 50], dtype=torch.int32)}),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training_step(backend: str, with_lse: bool, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
    """A function around the op, as a layer is: something before it and something after it."""

    def step(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        if not with_lse:
            return (block_sparse_attention(q * 1.5, k, v, layout, backend=backend, **options).sin(),)  # type: ignore[call-overload]
        out, lse = block_sparse_attention(q * 1.5, k, v, layout, backend=backend, return_lse=True, **options)  # type: ignore[call-overload]
        return out.sin(), lse.exp()

    return step


def assert_same(
    step: Callable[..., tuple[Tensor, ...]], compiled: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor],
    layout: Layout, **tolerance: float,
) -> None:  # fmt: skip
    eager, traced = step(*inputs, layout), compiled(*inputs, layout)
    weights = [torch.randn_like(x) for x in eager]
    gradients = [torch.autograd.grad(x, inputs, weights) for x in (eager, traced)]
    for a, b in zip((*eager, *gradients[0]), (*traced, *gradients[1]), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


def assert_as_exact_as_eager(
    step: Callable[..., tuple[Tensor, ...]], compiled: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor],
    layout: Layout, with_lse: bool = True, **options: Any,
) -> None:  # fmt: skip
    """What rounds at other places: its distance from float64 is at most twice the eager call's."""
    eager, traced = step(*inputs, layout), compiled(*inputs, layout)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = training_step("torch", with_lse, **options)(*doubles, layout)
    weights = [torch.randn_like(x) for x in exact]
    results = []
    for outputs, leaves in ((exact, doubles), (eager, inputs), (traced, inputs)):
        cast = [w.to(x.dtype) for w, x in zip(weights, outputs, strict=True)]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cast)))
    for a, b, c in zip(*results, strict=True):
        assert b.dtype == c.dtype
        # a float32 result is not blamed for its last bits
        assert (c.double() - a).norm() <= 2 * (b.double() - a).norm() + 3e-7 * a.norm()


# Each case on torch, half of them on Triton too: both take the same arguments. `make test-all` adds the rest.
ON_TRITON = ("gqa", "offset, v_dim differs", "top-k", "packed")


@pytest.mark.parametrize(
    ("name", "backend", "with_lse"),
    [
        pytest.param(
            *(name, backend, with_lse),
            marks=[] if (number + triton + with_lse) % 2 and (name in ON_TRITON or not triton) else pytest.mark.long,
        )
        for number, name in enumerate(CASES)
        for triton, backend in enumerate(("torch", "triton"))
        for with_lse in (True, False)
    ],
)
def test_a_compiled_training_step_is_the_eager_one(
    name: str, backend: str, with_lse: bool, device: torch.device
) -> None:
    problem = CASES[name]
    inputs, layout, _, _ = problem.make(device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    step = training_step(backend, with_lse, **options)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    if backend == "triton":
        assert_same(step, compiled, inputs, layout, rtol=0.0, atol=0.0)
    else:  # its compiled gradients are formulas, its eager ones autograd's
        assert_as_exact_as_eager(step, compiled, inputs, layout, with_lse, **options)


@pytest.mark.long
def test_inductor_takes_it_too(device: torch.device) -> None:
    inputs, layout, _, _ = CASES["gqa"].make(device)
    step = training_step("triton", True)
    assert_as_exact_as_eager(step, torch.compile(step, fullgraph=True), inputs, layout)


def test_other_lengths_and_layouts_are_compiled_anew_at_most_once_more(device: torch.device) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    step = training_step("torch", True)
    compiled = torch.compile(step, backend=count, fullgraph=True)
    for length in (40, 40, 70, 70, 100, 90):  # a new layout each, of one to four blocks
        inputs, layout, _, _ = Problem(s_q=length, s_k=length).make(device)
        assert_as_exact_as_eager(step, compiled, inputs, layout)
    assert len(graphs) <= 3  # the first length, then any number of blocks and any layout


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [
        ("torch", True),
        ("triton", None),
        pytest.param("torch", None, marks=pytest.mark.long),
        pytest.param("triton", True, marks=pytest.mark.long),
    ],
)
def test_other_scales_and_head_dimensions_are_traced_whole(
    backend: str, dynamic: bool | None, device: torch.device
) -> None:
    def step(scale: float | None, *inputs: Any) -> tuple[Tensor, ...]:
        return training_step(backend, True, softmax_scale=scale)(*inputs)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for dim, scale in ((16, None), (32, None), (32, 0.3)):
        inputs, layout, _, _ = Problem(dim=dim, s_q=40, s_k=40).make(device)
        assert_as_exact_as_eager(partial(step, scale), partial(compiled, scale), inputs, layout, softmax_scale=scale)


def test_checkpointing_within_a_compiled_step(device: torch.device) -> None:
    inputs, layout, _, _ = CASES["gqa"].make(device)
    step = training_step("triton", False)

    def recomputed(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        return (checkpoint(lambda *x: step(*x, layout)[0], q, k, v, use_reentrant=False),)

    assert_same(step, torch.compile(recomputed, backend="aot_eager", fullgraph=True), inputs, layout)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("static", "torch"),
        ("top-k", "portable"),
        pytest.param("static", "portable", marks=pytest.mark.long),
        pytest.param("top-k", "torch", marks=pytest.mark.long),
    ],
)
def test_operators_keep_torchs_rules(kind: LayoutKind, backend: str, device: torch.device) -> None:
    (q, k, v), layout, dout, dlse = Problem(heads=2, kv_heads=1, s_q=20, s_k=20, layout=kind).make(device)
    settings = (None, *layout_arguments(layout), 0.3, True, 0, "sbhd", backend, True, False)
    torch.library.opcheck(attend, (q, k, v, *settings))
    out, lse = (x.detach() for x in attend(q, k, v, *settings))
    finite = lse.masked_fill(lse == -torch.inf, 0)
    for gradients in ((dout, dlse), (None, dlse), (dout, None)):
        arguments = (*(x.detach() for x in (q, k, v)), out, finite, *gradients, *settings)
        torch.library.opcheck(attend_backward, arguments)


def test_eager_calls_do_without_the_operators(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.delattr(attention, "attend")
    inputs, layout, _, _ = CASES["gqa"].make(device)
    for backend in ("torch", "triton"):
        training_step(backend, True)(*inputs, layout)[0].sum().backward()


def test_operators_read_documents_again_that_a_graph_wrote_to_a_known_tensor(device: torch.device) -> None:
    inputs, layout, _, _ = CASES["packed"].make(device)
    bounds = torch.tensor([0, 17, 17, 50], dtype=torch.int32, device=device)
    settings = (*layout_arguments(layout), 50**-0.5, True, 0, "sbhd", "triton", True, False)
    for ends in ((17, 17), (30, 41)):
        bounds.data[1:3] = torch.tensor(ends)  # as a compiled graph reuses its buffers: torch counts no change
        found, _ = attend(*inputs, bounds, *settings)
        options = {"softmax_scale": 50**-0.5, "backend": "triton", "split_columns": False}
        wanted = block_sparse_attention(*inputs, layout, cu_seqlens=bounds.clone(), **options)  # type: ignore[call-overload]
        weight = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(out, inputs, weight) for out in (found, wanted)]
        for a, b in zip((found, *gradients[0]), (wanted, *gradients[1]), strict=True):
            assert torch.equal(a, b)


def test_documents_that_do_not_fit_are_rejected_when_the_compiled_call_runs() -> None:
    inputs, layout, _, _ = CASES["packed"].make(torch.device("cpu"))

    def step(bounds: Tensor) -> Tensor:
        return block_sparse_attention(*inputs, layout, cu_seqlens=bounds)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compiled(torch.tensor([0, 20, 50]))
    with pytest.raises(ValueError, match="ascend from 0 to the 50 rows"):
        compiled(torch.tensor([0, 20, 51]))


def test_a_layout_let_go_before_the_backward_is_an_error_and_no_other_layout() -> None:
    inputs, layout, dout, _ = CASES["gqa"].make(torch.device("cpu"))
    (out,) = torch.compile(training_step("torch", False), backend="aot_eager", fullgraph=True)(*inputs, layout)
    _, other, _, _ = CASES["gqa"].make(torch.device("cpu"))
    assert registered(other.handle) is other
    torch._dynamo.reset()  # guards hold no layouts, but their caches may
    del layout
    gc.collect()
    with pytest.raises(RuntimeError, match="keep the layout"):
        out.backward(dout)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_graph_serves_layouts_made_within_it(backend: str, device: torch.device) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
        layout = TopKLayout.from_indices(indices, 32, num_heads=2)
        return training_step(backend, True)(q, k, v, layout)

    compiled = torch.compile(step, backend=count, fullgraph=True)
    inputs, _, _, _ = Problem(s_q=90, s_k=90).make(device)
    for _ in range(5):
        indices = random_indices(1, 2, 3, 3, 0.5).to(device)
        for eager, traced in zip(step(*inputs, indices), compiled(*inputs, indices), strict=True):
            torch.testing.assert_close(eager, traced)
    assert len(graphs) == 1


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_layout_is_known_by_a_handle_of_its_own(again: Callable[[BlockLayout], BlockLayout]) -> None:
    layout = BlockLayout.from_mask(torch.rand(2, 3, 3) < 0.5, 32)
    layout.cache["something"] = 1
    copied = again(layout)
    assert registered(copied.handle) is copied
    assert registered(layout.handle) is layout
    assert copied.mask().equal(layout.mask())
    assert not copied.cache


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("block", [64, 128])
def test_inductor_on_a_gpu(block: int, backend: str) -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=block, dtype=torch.bfloat16, keep=0.5)
    inputs, layout, _, _ = problem.make(torch.device("cuda"))
    step = training_step(backend, True)
    assert_as_exact_as_eager(step, torch.compile(step, fullgraph=True), inputs, layout)


@pytest.mark.gpu
def test_inductors_cuda_graphs_after_an_eager_call() -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=128, dtype=torch.bfloat16, keep=0.5)
    inputs, layout, _, _ = problem.make(torch.device("cuda"))
    step = training_step("triton", True)
    sum(x.sum() for x in step(*inputs, layout)).backward()  # builds what the layout keeps
    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        assert_as_exact_as_eager(step, compiled, inputs, layout)
