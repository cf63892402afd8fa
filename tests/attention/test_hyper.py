"""HyperAttention as a kind: what it rejects, what it counts, and where its random numbers come from."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from s2train.kernels.attention import Backend
from s2train.kernels.dense import dense_causal_attention
from s2train.kernels.hyper.hashing import hash_ranks
from s2train.kernels.hyper.reference import key_weights
from s2train.kernels.hyper.settings import HyperSettings

from s2train.attention.hybrid import build_hybrid_layout
from s2train.attention.hyper_reads import expected_reads
from s2train.config import LayoutConfig, ScheduleConfig
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.megatron import hyper_attention
from s2train.megatron.core_attention import CausalCoreAttention, packed_documents
from s2train.megatron.hyper_attention import HyperCoreAttention, document_runs
from s2train.megatron.layout_cache import LayoutCache
from s2train.megatron.model import transformer_config
from s2train.planning import check, compose_run, hybrid_layout

CPU = Hardware("CPU", "cpu", 1 << 36, None)


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        ({"bucket": 24}, r"layout.kinds.H.bucket=24: is no power of two"),
        ({"bucket": 2048}, r"layout.kinds.H.bucket=2048: is larger than the shortest interval, of 1024 keys"),
        ({"shortest": 1000}, r"layout.kinds.H.shortest=1000: is no power of two"),
        ({"samples": 0}, r"layout.kinds.H.samples=0: without samples the result is biased"),
        ({"projections": 31}, r"layout.kinds.H.projections=31: the hash has too many"),
        ({"window": 24}, r"layout.kinds.H.window=24: exact keys are blocks of 16"),
        ({"sinks": 2048}, r"layout.kinds.H.sinks=2048: exact keys are blocks of 16"),
        ({"seed": 1}, r"layout.kinds.H.seed=1: no setting of kind hyper"),
    ],
)
def test_settings_that_can_not_be_are_rejected(settings: dict[str, Any], telling: str) -> None:
    layout = LayoutConfig("DH", kinds={"H": {"kind": "hyper", **settings}})
    with pytest.raises(ConfigError, match=f"^{telling}"):
        build_hybrid_layout(layout, ScheduleConfig(), num_layers=2, num_heads=4, num_query_groups=2)


@pytest.mark.parametrize(
    ("settings", "telling"),
    [
        (["layout.kinds.H.samples=129"], r"layout.kinds.H.samples=129: the longest interval of .* has 128 keys"),
        (["layout.kinds.H.shortest=256"], r"layout.kinds.H.shortest=256: .* is one interval, which is read exactly"),
        (["model.head_dim=258"], r"model.head_dim=258: hyper attention \(letter H\) hashes heads of up to 256"),
    ],
)
def test_a_run_that_it_can_not_serve_is_rejected(settings: list[str], telling: str) -> None:
    with pytest.raises(ConfigError, match=f"^{telling}"):
        check(compose_run(["+model=tiny_hyper", *settings]), 1, CPU)


def test_context_parallel_is_rejected() -> None:
    cfg = compose_run(["+model=tiny_hyper", "parallel.cp=2"])
    with pytest.raises(ConfigError, match=r"^parallel.cp=2: hyper attention .* doesn't support context parallel ranks"):
        check(cfg, 2, CPU)


def test_the_published_use_replaces_the_last_layers() -> None:
    cfg = compose_run(["+model=7b_dense", "layout=hyper_b256", "layout.layers=D24H8"])
    assert hybrid_layout(cfg).letters == "D" * 24 + "H" * 8


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        (HyperSettings(16, 4, 8, 32, 0, 0), 300),
        (HyperSettings(16, 8, 8, 16, 16, 16), 333),
        (HyperSettings(32, 200, 8, 64, 48, 32), 270),
        (HyperSettings(16, 16, 8, 64, 64, 64), 257),
    ],
    ids=["without a window", "small blocks", "all sampled", "all of the shortest interval"],
)
def test_expected_reads_are_those_of_random_keys(settings: HyperSettings, length: int) -> None:
    total, draws = 0.0, 6
    for draw in range(draws):
        q, k = torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
        seeds = torch.tensor([draw, 100 + draw])
        weights = key_weights(*hash_ranks(q, k, seeds, settings.projections), settings, seeds, causal=True)
        total += float((weights > 0).double().sum((-1, -2)).mean()) / draws
    assert expected_reads(settings, length) == pytest.approx(total, rel=0.01)


def test_documents_of_one_interval_are_one_call_with_their_neighbours() -> None:
    ends = [0, 0, 10, 26, 26, 43, 60, 60, 70, 75, 75]  # lengths 0, 10, 16, 0, 17, 17, 0, 10, 5, 0
    assert document_runs(ends, shortest=16) == [(0, 4), (4, 5), (5, 6), (6, 10)]
    assert document_runs([0, 17, 17], shortest=16) == [(0, 1)]  # none without tokens


def test_the_kernels_attend_within_documents_as_torch_does() -> None:
    ends = torch.tensor([[0, 9, 9, 20, 64, 75], [0, 40, 75, 75, 75, 75]], dtype=torch.int32)
    small = ["layout.kinds.H.shortest=16", "layout.kinds.H.samples=4"]
    inputs = [torch.randn(75, 2, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    dout, results = torch.randn(75, 2, 64), []
    for backend in ("torch", "triton"):
        out = core(1, 0, 7, *small, backend=backend)(*inputs, None, packed_seq_params=packed_documents(ends, 75))
        results.append((out, *torch.autograd.grad(out, inputs, dout)))
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_layers_share_the_bounds_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    def op(q: torch.Tensor, *_: Any, cu_seqlens: torch.Tensor, **how: Any) -> torch.Tensor:
        bounds.append(cu_seqlens)
        return q

    monkeypatch.setattr(hyper_attention, "block_sparse_attention", op)
    inputs = [torch.randn(75, 2, heads, 16) for heads in (4, 2, 2)]
    packed = packed_documents(torch.tensor([[0, 9, 20, 64, 75], [0, 40, 75, 75, 75]], dtype=torch.int32), 75)
    layers = [core(1, 0, 7, f"layout.kinds.H.shortest={shortest}", "layout.kinds.H.samples=4") for shortest in (16, 64)]
    for layer in (layers[0], layers[0], layers[1]):
        layer(*inputs, None, packed_seq_params=packed)
    assert [one.tolist() for one in bounds] == 2 * [[0, 9, 20], [0, 11]] + [[0, 9, 20, 64, 75], [0, 40, 75, 75, 75]]
    assert all(one is other for one, other in zip(bounds[:2], bounds[2:4], strict=True))


@pytest.mark.parametrize("documents", [False, True])
def test_the_kernels_of_a_step_run_before_it(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in ("hyper_attention", "block_sparse_attention"):
        op = getattr(hyper_attention, name)
        monkeypatch.setattr(
            hyper_attention,
            name,
            lambda q, *_, name=name, op=op, **how: ran.append((name, q.shape[1])) or op(q, *_, **how),
        )
    layer = hybrid_layout(compose_run(["+model=tiny_hyper"])).layers[2]
    inputs = [torch.zeros(70, 2, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    HyperCoreAttention.compile_kernels(layer, *inputs, 0, "torch", documents)
    alone = [("block_sparse_attention", 1), ("hyper_attention", 1)]
    assert ran == (alone if documents else [("hyper_attention", 2)])
    assert all(x.grad is not None for x in inputs)


def core(tp: int, rank: int, step: int, *settings: str, backend: Backend = "torch") -> HyperCoreAttention:
    """The third layer of four heads in two groups, as a tensor parallel rank has it."""
    cfg = compose_run(["+model=tiny_hyper", *settings])
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: tp, rank=lambda: rank), cp=SimpleNamespace(size=lambda: 1))
    made = HyperCoreAttention(
        replace(transformer_config(cfg), tensor_model_parallel_size=1),
        3,
        None,  # type: ignore[arg-type]
        "self",
        pg_collection=groups,  # type: ignore[arg-type]
        layer_layout=hybrid_layout(cfg).layers[2],
        num_query_groups=cfg.model.num_query_groups,
        cache=LayoutCache(),
        backend=backend,
        seed=5,
    )
    made.step = step
    return made


def seeds(one: CausalCoreAttention) -> list[torch.Tensor]:
    """What the core gives the op: seeds of directions, and of samples."""
    q = torch.randn(128, 1, one.heads[1] - one.heads[0], 8)
    k = torch.randn(128, 1, one.num_kv_heads, 8)
    given: list[torch.Tensor] = []

    def op(*arguments: Any, **_: Any) -> torch.Tensor:
        given.extend(arguments[4:6])
        return q

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2train.megatron.hyper_attention.hyper_attention", op)
        one.attend(q, k, k, 0)
    return given


def test_tensor_parallel_ranks_draw_as_one_does() -> None:
    whole = seeds(core(1, 0, 7))
    parts = [seeds(core(2, rank, 7)) for rank in range(2)]
    assert all(torch.equal(one, torch.cat(pair)) for one, pair in zip(whole, zip(*parts, strict=True), strict=True))
    assert len(set(torch.cat(whole).tolist())) == 4


def test_tensor_parallel_ranks_that_share_a_kv_head_draw_alike() -> None:
    whole = seeds(core(1, 0, 7))
    parts = [seeds(core(4, rank, 7)) for rank in range(4)]
    for one, shares in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one.repeat_interleave(2), torch.cat(shares))


def test_a_prompt_is_read_exactly() -> None:
    one = core(1, 0, 7)
    query, key, value = (torch.randn(250, 2, heads, 16) for heads in (4, 2, 2))
    dense = dense_causal_attention(query, key, value, softmax_scale=one.softmax_scale)
    assert (one.attend(query, key, value, 0) - dense).abs().max() > 0.01
    one.kv = object()  # type: ignore[assignment]
    assert torch.equal(one.attend(query, key, value, 0), dense)


def test_directions_stay_over_the_steps_only_where_they_are_fixed() -> None:
    first, later = seeds(core(1, 0, 1)), seeds(core(1, 0, 2))
    assert not set(torch.cat(first).tolist()) & set(torch.cat(later).tolist())
    fixed = "layout.kinds.H.fixed_projections=true"
    (directions, samples), (same, others) = seeds(core(1, 0, 1, fixed)), seeds(core(1, 0, 2, fixed))
    assert torch.equal(directions, same)
    assert not torch.equal(samples, others)
