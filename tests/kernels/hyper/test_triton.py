"""The kernels of HyperAttention against the oracle: interpreted without a GPU, compiled with one."""

from dataclasses import replace

import pytest
import torch
from s2train.kernels.hyper import HyperSettings, hyper_attention
from s2train.kernels.hyper.hashing import gray_ranks, projections
from s2train.kernels.hyper.plan import make_plan, tiles
from s2train.kernels.hyper.reference import key_weights
from torch.utils.checkpoint import checkpoint

from tests.kernels.hyper.cases import SMALL, HyperProblem, assert_as_exact_as_torch

WIDE = replace(SMALL, bucket=32)  # fewer, larger tiles: faster in the interpreter
CASES = {
    "gqa": HyperProblem(75, settings=WIDE),
    "small_buckets": HyperProblem(70, heads=1),
    "batch": HyperProblem(67, heads=2, kv_heads=2, batch=2, settings=WIDE, options={"format": "bhsd"}),
    "not_causal": HyperProblem(75, settings=WIDE, options={"causal": False}),
    "not_causal_without_exact_keys": HyperProblem(
        50, settings=replace(WIDE, window=0, sinks=0), options={"causal": False, "format": "bshd"}
    ),
    "v_dim_differs_and_scale": HyperProblem(
        67, heads=1, dim=20, v_dim=12, settings=WIDE, options={"softmax_scale": 0.4}
    ),
    "all_keys_sampled": HyperProblem(70, heads=1, settings=replace(WIDE, samples=64)),
    "one_projection": HyperProblem(70, settings=replace(SMALL, bucket=16, projections=1), heads=1),
    "all_exact": HyperProblem(31, settings=WIDE),
    "bfloat16": HyperProblem(75, dtype=torch.bfloat16, settings=WIDE),
    "float16": HyperProblem(75, dtype=torch.float16, settings=WIDE),
    "all_keys_sampled_in_bfloat16": HyperProblem(70, dtype=torch.bfloat16, settings=replace(WIDE, samples=64)),
    "one_token_past_the_shortest_interval": HyperProblem(33, settings=replace(WIDE, window=0, sinks=0)),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("problem", CASES.values(), ids=CASES.keys())
def test_output_lse_and_gradients_are_as_exact_as_torch(problem: HyperProblem, device: torch.device) -> None:
    assert_as_exact_as_torch(problem, "triton", device)


def test_a_later_token_changes_no_earlier_output(device: torch.device) -> None:
    (q, k, v), seeds, *_ = HyperProblem(75, heads=1, settings=WIDE).make(device)
    base = hyper_attention(q, k, v, WIDE, *seeds, backend="triton")
    at = int(torch.randint(33, 75, ()))
    changed = [torch.cat([x[:at], 3 * torch.randn_like(x[at:])]) for x in (q, k, v)]
    found = hyper_attention(*changed, WIDE, *seeds, backend="triton")
    assert found[:at].equal(base[:at])
    assert not found[at:].equal(base[at:])


def test_an_earlier_output_has_no_gradient_of_a_later_token(device: torch.device) -> None:
    inputs, seeds, dout, _ = HyperProblem(75, heads=1, settings=WIDE).make(device)
    at = int(torch.randint(33, 75, ()))
    out = hyper_attention(*inputs, WIDE, *seeds, backend="triton")
    for gradient in torch.autograd.grad(out[:at], inputs, dout[:at]):
        assert gradient[at:].count_nonzero() == 0
        assert gradient[:at].count_nonzero() > 0


def test_a_prefix_has_the_outputs_of_the_whole(device: torch.device) -> None:
    (q, k, v), seeds, *_ = HyperProblem(75, heads=1, settings=WIDE).make(device)
    whole = hyper_attention(q, k, v, WIDE, *seeds, backend="triton")
    found = hyper_attention(q[:50], k[:50], v[:50], WIDE, *seeds, backend="triton")
    torch.testing.assert_close(found, whole[:50], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "group", "dim", "bits"), [(4, 2, 16, 8), (2, 1, 20, 16), (2, 2, 8, 30)])
def test_the_kernel_hashes_as_torch(heads: int, group: int, dim: int, bits: int, device: torch.device) -> None:
    from s2train.kernels.hyper.launches import hash_rows

    x = torch.randn(2, 40, heads, dim, device=device).transpose(1, 2)
    directions = projections(torch.arange(heads // group, device=device), dim, bits).float()
    expected = gray_ranks(x.double(), directions.double().repeat_interleave(group, 0))
    assert hash_rows(x, directions).equal(expected)


def test_the_layout_of_exact_keys_is_built_without_reading_the_device() -> None:
    from s2train.kernels.hyper.launches import local_layout

    layout = local_layout(SMALL, 9, False, 2, True, torch.device("meta"))  # nothing can be read from a meta tensor
    expected = local_layout(SMALL, 9, False, 2, True, torch.device("cpu"))
    assert layout.device.type == "meta"
    assert layout.on_host is not None
    assert layout.on_host.mask().equal(expected.mask())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [33, 75, 128, 211])
def test_the_plan_lists_what_the_oracle_weighs(length: int, causal: bool) -> None:
    """Per level and query: the keys of its bucket and samples are those of weight 1 and above."""
    settings = replace(SMALL, samples=5, window=0, sinks=0)
    batch, heads, kv_heads = 2, 4, 2
    q_ranks, k_ranks = (torch.randint(40, (batch, h, length)).int() for h in (heads, kv_heads))
    seeds = torch.randint(1 << 60, (kv_heads,))
    plan = make_plan(q_ranks, k_ranks, settings, seeds, causal)
    found = torch.zeros(batch * heads * length, length, dtype=torch.float64)
    table, ranges = tiles(plan, 16)
    rows, group = plan.rows, plan.group
    for r, (first, end) in zip(plan.ranges, ranges, strict=True):
        for bucket, start, stop in table[first:end].tolist():
            if bucket < 0:
                continue
            row_interval, own = divmod(bucket - r.bucket_base, r.buckets)
            row, interval = divmod(row_interval, r.level.count)
            base = r.key_base + row_interval * r.level.size
            keys = plan.keys[base : base + r.level.size][own * settings.bucket : (own + 1) * settings.bucket]
            number = r.sample_base + row_interval * r.samples
            sampled = plan.sample_keys[number : number + r.samples]
            others = plan.sample_buckets[number : number + r.samples] != own
            weights = plan.sample_weights[r.weight_base : r.weight_base + r.samples].exp2().round().double()
            for query in plan.queries[start : min(start + 16, stop)].tolist():
                member, position = divmod(query, length)
                at = (row * group + member) * length + position
                local = position - interval * r.level.period - r.level.shift
                entry = ((row * group + member) * r.level.count + interval) * r.level.size + local
                assert plan.own_buckets[r.query_base + entry] == own
                found[at, keys.long()] += 1
                found[at, sampled[others].long()] += weights[others]
    expected = key_weights(q_ranks, k_ranks, settings, seeds, causal)
    own_interval = torch.arange(length) // settings.shortest
    if causal:
        expected = expected.masked_fill(own_interval[:, None] == own_interval[None, :], 0)
    assert rows == batch * kv_heads
    assert found.view(expected.shape).equal(expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "projections"), [(33, 8), (211, 3), (256, 30)])
def test_the_kernels_make_the_plan_that_torch_makes(
    length: int, projections: int, causal: bool, device: torch.device
) -> None:
    settings = replace(SMALL, projections=projections)
    ranks = [torch.randint(min(1 << projections, 1 << 20), (2, h, length), device=device).int() for h in (4, 2)]
    seeds = torch.randint(1 << 60, (2,), device=device)
    plain, fast = (make_plan(*ranks, settings, seeds, causal, kernels=kernels) for kernels in (False, True))
    assert plain.sizes() == fast.sizes()
    used = int(plain.bucket_starts[-1])  # then come readers beyond the sequence
    assert fast.queries[:used].equal(plain.queries[:used])
    for name in ("keys", "bucket_starts", "sample_keys", "sample_buckets", "sample_weights"):
        assert getattr(fast, name).equal(getattr(plain, name)), name
    for r in plain.ranges:
        shape = (plain.rows * plain.group, r.level.count, r.level.size)
        entries = slice(r.query_base, r.query_base + shape[0] * shape[1] * shape[2])
        for interval in range(r.level.count):
            first, stop = r.level.readers(interval, length)
            own = [x.own_buckets[entries].view(shape)[:, interval, : stop - first] for x in (plain, fast)]
            assert own[0].equal(own[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_on_a_gpu_as_exact_as_torch(dtype: torch.dtype, dim: int, causal: bool, device: torch.device) -> None:
    settings = HyperSettings(bucket=128, samples=96, projections=12, shortest=256, window=128, sinks=64)
    problem = HyperProblem(2333, heads=4, kv_heads=2, dim=dim, dtype=dtype, settings=settings)
    assert_as_exact_as_torch(replace(problem, options={"causal": causal}), "triton", device)


def test_a_compiled_call_equals_an_eager_one(device: torch.device) -> None:
    problem = HyperProblem(70, heads=1, settings=WIDE)
    inputs, seeds, dout, dlse = problem.make(device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hyper_attention(q, k, v, WIDE, seeds[0], seeds[1], return_lse=True, backend="triton")

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        out = function(*inputs, seeds)
        results.append((*out, *torch.autograd.grad(out, inputs, (dout, dlse))))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_checkpointing_recomputes_the_same(device: torch.device) -> None:
    (q, k, v), seeds, dout, _ = HyperProblem(70, heads=1, settings=WIDE).make(device)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return hyper_attention(*qkv, WIDE, *seeds, backend="triton")

    direct = torch.autograd.grad(attend(q, k, v), (q, k, v), dout)
    again = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False), (q, k, v), dout)
    assert all(a.equal(b) for a, b in zip(direct, again, strict=True))


def test_a_call_in_inference_mode_leaves_nothing_that_training_can_not_save(device: torch.device) -> None:
    settings = replace(WIDE, samples=7)
    (q, k, v), seeds, *_ = HyperProblem(50, heads=1, settings=settings).make(device)
    with torch.inference_mode():
        evaluated = hyper_attention(q, k, v, settings, *seeds, backend="triton").clone()
    trained = hyper_attention(q, k, v, settings, *seeds, backend="triton")
    assert trained.equal(evaluated)
    assert all(x.isfinite().all() for x in torch.autograd.grad(trained.sum(), (q, k, v)))
