"""Forward and backward captured in a CUDA graph, after a call that has built what a layout keeps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.hopper.backward_schedule import backward_schedule
from s2train.kernels.hopper.forward_schedule import forward_schedule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.cases import Problem

DOCUMENTS = torch.tensor([0, 300, 301, 700, 1000], dtype=torch.int32)
CASES = {
    "block 64": Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=64, dtype=torch.bfloat16, keep=0.4),
    "block 128": Problem(heads=4, kv_heads=4, s_q=1000, s_k=1000, dim=128, block=128, dtype=torch.bfloat16, keep=0.4),
    "not causal": Problem(s_q=500, s_k=700, dim=64, block=64, dtype=torch.bfloat16, options={"causal": False}),
    "float32": Problem(s_q=300, s_k=300, dim=64, block=32),
    "packed": Problem(s_q=1000, s_k=1000, dim=128, block=64, dtype=torch.bfloat16, options={"cu_seqlens": DOCUMENTS}),
}


def training_step(
    inputs: list[Tensor], layout: BlockLayout, dout: Tensor, dlse: Tensor, backend: str, options: dict[str, object]
) -> Callable[[], tuple[Tensor, ...]]:
    def step() -> tuple[Tensor, ...]:
        out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend=backend, **options)  # type: ignore[call-overload]
        finite = lse.masked_fill(lse == -torch.inf, 0)
        return out, lse, *torch.autograd.grad((out, finite), inputs, (dout, dlse))

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "portable"])
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_a_replayed_graph_gives_what_an_eager_call_gives(problem: Problem, backend: str) -> None:
    device = torch.device("cuda")
    inputs, layout, dout, dlse = problem.make(device)
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in problem.options.items()}
    torch.use_deterministic_algorithms(True)  # so that results can be compared bit by bit
    try:
        step = training_step(inputs, layout, dout, dlse, backend, options)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = step()
        for _ in range(2):
            with torch.no_grad():
                for x in (*inputs, dout, dlse):
                    x.copy_(torch.randn_like(x))
            graph.replay()
            expected = step()
            assert all(a.equal(b) for a, b in zip(replayed, expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_a_replayed_graph_of_the_fastest_backward_agrees_with_eager(block: int) -> None:
    problem = Problem(heads=8, kv_heads=2, s_q=1000, s_k=1000, dim=128, block=block, dtype=torch.bfloat16, keep=0.4)
    inputs, layout, dout, dlse = problem.make(torch.device("cuda"))
    step = training_step(inputs, layout, dout, dlse, "triton", {})
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        for x in (*inputs, dout, dlse):
            x.copy_(torch.randn_like(x))
    for _ in range(2):  # sums of dq start from 0 in every replay
        graph.replay()
        for a, b in zip(replayed, step(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


class Waits(TorchDispatchMode):
    """Names the operators for which the host would wait for a GPU: none can be captured."""

    OPERATORS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::_unique2", "aten::unique_dim", "aten::is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.OPERATORS:
            self.found.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_second_call_reads_nothing_back_and_builds_nothing() -> None:
    inputs, layout, dout, dlse = Problem(heads=4, kv_heads=2, s_q=70, s_k=70).make(torch.device("cpu"))
    step = training_step(inputs, layout, dout, dlse, "portable", {})
    step()
    built = {key: id(value) for key, value in layout.cache.items()}
    assert built
    with Waits() as waits:
        step()
    assert waits.found == []
    assert built == {key: id(value) for key, value in layout.cache.items()}


def test_hoppers_work_lists_are_read_from_the_device_once() -> None:
    layout = BlockLayout.from_mask(torch.rand(4, 8, 8) < 0.5, 64)
    for expected in (True, False):
        with Waits() as waits:
            forward_schedule(layout, causal=True, query_end=512, s_k=512)
            backward_schedule(layout, 2, 512, 512, 0, True)
        assert bool(waits.found) == expected
