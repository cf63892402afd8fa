"""Kernels are compiled once on each machine, in the shapes of the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s2train.kernels.dense_choice import DenseChoice

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import KINDS
from s2train.megatron import dense_kernels, specs
from s2train.planning import hybrid_layout
from s2train.training import warm_up
from s2train.training.warm_up import Part, compile_kernels, run_once_per_machine
from tests.attention.toy import ToyKind
from tests.test_configs import pretrain


@pytest.mark.parametrize(("local_rank", "expected"), [("0", ["compiled", "met"]), ("1", ["met"]), ("7", ["met"])])
def test_the_first_rank_of_a_machine_compiles_before_the_others_continue(
    local_rank: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("met"))
    run_once_per_machine(lambda: done.append("compiled"))
    assert done == expected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of a stand-in for the op on a GPU, which records shapes and is differentiable."""
    made: list[Any] = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Any, **how: Any) -> torch.Tensor:
        made.append(SimpleNamespace(q=tuple(query.shape), k=tuple(key.shape), v=tuple(value.shape), **how))
        made[-1].dtype, made[-1].is_backward = query.dtype, False
        made[-1].row = value.stride(0) // value.shape[1]
        made[-1].is_dense = layout.mask().equal(torch.ones_like(layout.mask()).tril())
        out = query * 1.0
        out.register_hook(lambda _: setattr(made[-1], "is_backward", True))
        return out

    for module in (warm_up, dense_kernels):
        monkeypatch.setattr(module, "block_sparse_attention", attend)
    monkeypatch.setattr(warm_up, "resolve_backend", lambda backend, device: "torch" if backend == "torch" else "triton")
    return made


def compile_for(*settings: str, cp: tuple[int, int] = (0, 1), part: Part | None = None) -> None:
    rank, size = cp
    cfg = pretrain(
        "+model=tiny_hybrid", "train.seq_length=256", "train.micro_batch_size=2", f"parallel.cp={size}", *settings
    )
    compile_kernels(cfg, hybrid_layout(cfg), torch.device("cpu"), rank, part)


def test_each_distinct_sparse_layer_runs_once_forward_and_backward(calls: list[Any]) -> None:
    state = torch.get_rng_state()
    compile_for("train.precision=bf16")
    (call,) = calls
    assert (call.q, call.k, call.v) == ((256, 2, 4, 32), (256, 2, 2, 32), (256, 2, 2, 32))
    assert call.dtype == torch.bfloat16
    assert call.is_backward
    assert torch.equal(torch.get_rng_state(), state)  # the weights' initialisation is unchanged


def test_a_part_runs_one_sort_of_layer_in_one_direction(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: list[str] = []

    @contextmanager
    def leaving_out() -> Iterator[None]:
        left_out.append("forward")
        yield

    monkeypatch.setattr(warm_up, "forwards_left_out", leaving_out)
    settings = ["dense_attention=s2train", "+layout.kinds.E={kind:block_selection,top_k:3}", "layout.layers=DSES"]
    for layers, dense in (("static", [True, False]), ("sparse", [False]), ("dense", [True])):
        for direction in ("forward", "backward"):
            calls.clear()
            left_out.clear()
            compile_for(*settings, part=Part(layers, direction))  # type: ignore[arg-type]
            assert [call.is_dense for call in calls] == dense
            assert [call.is_backward for call in calls] == [direction == "backward"] * len(dense)
            assert left_out == ["forward"] * (direction == "backward")


def test_tensor_and_context_parallel_shares_run_in_their_shapes(calls: list[Any]) -> None:
    compile_for("parallel.tp=2", cp=(1, 2))
    shapes = [(call.q[0], call.k[0], call.q[2], call.query_offset) for call in calls]
    assert shapes == [(64, 128, 2, 64)] * 2 + [(64, 192, 2, 128)] * 2


def test_values_are_a_view_of_the_projection_unless_ranks_copy_them(calls: list[Any]) -> None:
    compile_for("layout.layers=S")
    compile_for("layout.layers=S", cp=(0, 2))
    assert [call.row for call in calls] == [2 * (2 + 2) * 32, 2 * 32, 2 * 32]


def test_within_documents_one_sequence_at_a_time_runs_as_in_a_step(calls: list[Any]) -> None:
    compile_for("data.attention_within_documents=true")
    for call in calls:
        assert (call.q, call.k, call.v) == ((256, 1, 4, 32), (256, 1, 2, 32), (256, 1, 2, 32))
        assert call.cu_seqlens.tolist() == [0, 256]
        assert call.is_backward
    assert [call.is_dense for call in calls] == [True, False]


def test_a_divided_sequence_runs_documents_that_begin_and_those_that_continue(calls: list[Any]) -> None:
    compile_for("data.attention_within_documents=true", "layout.layers=S", cp=(0, 2))
    shapes = [(call.q[0], call.k[0], call.cu_seqlens is not None, call.query_offset) for call in calls]
    assert shapes == [(64, 64, True, 0), (64, 64, True, 0), (64, 256, False, 192)]


def test_dense_layers_run_the_op_if_they_do_in_a_step(calls: list[Any]) -> None:
    compile_for("layout=dense", "dense_attention=s2train", "parallel.tp=2", cp=(1, 2))
    shapes = [(call.q[0], call.k[0], call.q[2], call.query_offset) for call in calls]
    assert shapes == [(64, 128, 2, 64), (64, 192, 2, 128)]
    assert all(call.is_dense and call.is_backward for call in calls)


@pytest.mark.parametrize("documents", [False, True])
def test_dense_layers_run_flash_attention_4_if_they_do_in_a_step(
    documents: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    def fa4(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **how: Any) -> torch.Tensor:
        ran.append((tuple(query.shape), how.get("bounds") is not None))
        return query * 1.0

    monkeypatch.setattr(warm_up, "choose_kernels", lambda inputs, *_: DenseChoice(inputs.kind, "fa4"))
    for module in ("s2train.megatron.dense_kernels", "s2train.kernels.dense"):
        monkeypatch.setattr(f"{module}.fa4_attention", fa4)
    # by name, a CPU chooses too
    settings = ["layout=dense", "dense_attention=s2train", f"data.attention_within_documents={documents}"]
    compile_for(*settings)
    assert ran == [((256, 1 if documents else 2, 4, 32), documents)]
    assert calls == []


def test_layers_whose_reads_the_data_choose_run_what_their_core_attention_says(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []

    class Core:
        @staticmethod
        def compile_kernels(
            layer: LayerLayout, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *how: Any
        ) -> None:
            ran.append((layer.kind.letter, tuple(query.shape), tuple(key.shape), tuple(value.shape), *how))
            (query.sum() + key.sum() + value.sum()).backward()

    monkeypatch.setitem(KINDS, "toy", ToyKind)
    monkeypatch.setattr(specs, "core_attention_class", lambda kind: Core)
    settings = ["+layout.kinds.T={kind:toy}", "layout.layers=TDTT"]
    compile_for(*settings, "parallel.tp=2")
    assert ran == [("T", (256, 2, 2, 32), (256, 2, 1, 32), (256, 2, 1, 32), 0, "auto", False)]
    assert calls == []
    compile_for(*settings, "data.attention_within_documents=true")
    assert ran[-1][-1] is True
    for part, letters in ((Part("data-dependent", "passes"), ["T"]), (Part("static", "backward"), [])):
        ran.clear()
        compile_for(*settings, part=part)
        assert [letter for letter, *_ in ran] == letters


def test_a_teachers_dense_layers_run_too(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    ran: list[str] = []
    core = SimpleNamespace(compile_kernels=lambda layer, *_: ran.append(layer.kind.letter))
    monkeypatch.setattr(specs, "core_attention_class", lambda kind: core)
    monkeypatch.setattr(warm_up, "_attend_densely", lambda *_: ran.append("dense"))
    for teacher, expected in (("null", ["E"]), ("runs/x", ["E", "dense"])):
        ran.clear()
        kind = f"+layout.kinds.E={{kind:block_selection,top_k:3,teacher:{teacher}}}"
        compile_for(kind, "layout.layers=E")
        assert ran == expected


@pytest.mark.parametrize("settings", [["attention_backend=torch"], ["layout=dense"]])
def test_nothing_runs_if_no_kernel_is_compiled(settings: list[str], calls: list[Any]) -> None:
    compile_for(*settings)
    assert calls == []
