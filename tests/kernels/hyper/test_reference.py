"""The oracle of HyperAttention: exact where everything is read, causal, unbiased, with exact gradients."""

import math
from dataclasses import replace

import pytest
import torch
from s2train.kernels.hyper import HyperSettings, hyper_attention, reference_hyper_attention
from s2train.kernels.hyper.hashing import hash_ranks, projections, sample_slots, uniform
from s2train.kernels.hyper.reference import exact_keys, key_weights
from s2train.kernels.hyper.settings import levels
from torch import Tensor

from tests.kernels.hyper.cases import SMALL, HyperProblem

F64 = torch.float64
ALL = replace(SMALL, samples=1 << 20)
CPU = torch.device("cpu")


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Exact attention of [b, h, n, d], and its log-sum-exp."""
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores.softmax(-1) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [20, 64, 301])
@pytest.mark.parametrize("settings", [ALL, replace(ALL, window=0, sinks=0), replace(ALL, projections=1)])
def test_with_all_keys_sampled_it_is_exact_attention(settings: HyperSettings, length: int, causal: bool) -> None:
    problem = HyperProblem(length, heads=4, kv_heads=2, batch=2, dtype=F64, options={"format": "bhsd"})
    inputs, seeds, dout, dlse = problem.make(CPU)
    found = reference_hyper_attention(*inputs, settings, *seeds, causal=causal, format="bhsd")
    expected = plain(*inputs, causal)
    weights = (dout, dlse.double())
    for x, y in zip(
        (*found, *torch.autograd.grad(found, inputs, weights)),
        (*expected, *torch.autograd.grad(expected, inputs, weights)),
        strict=True,
    ):
        assert (x - y).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_later_token_changes_no_earlier_output(dtype: torch.dtype) -> None:
    (q, k, v), seeds, *_ = HyperProblem(200, heads=4, kv_heads=2, dtype=dtype).make(CPU)
    base = hyper_attention(q, k, v, SMALL, *seeds)
    for at in torch.randint(1, 200, (8,)).tolist():
        changed = [torch.cat([x[:at], 3 * torch.randn_like(x[at:])]) for x in (q, k, v)]
        assert hyper_attention(*changed, SMALL, *seeds)[:at].equal(base[:at])


def test_a_prefix_has_the_outputs_of_the_whole() -> None:
    (q, k, v), seeds, *_ = HyperProblem(300, heads=2, dtype=F64).make(CPU)
    whole = hyper_attention(q, k, v, SMALL, *seeds)
    for at in (1, 32, 33, 100, 257, 299):
        assert (hyper_attention(q[:at], k[:at], v[:at], SMALL, *seeds) - whole[:at]).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("samples", [3, 8, 40])
def test_weights_of_all_keys_are_one_on_average_over_seeds(samples: int, causal: bool) -> None:
    """So numerator and denominator, sums over keys of weight times a constant, are unbiased."""
    settings, runs, n = replace(SMALL, samples=samples, window=0, sinks=0), 400, 150
    q_ranks, k_ranks = (torch.randint(256, (1, 1, n)).int().expand(1, runs, n) for _ in range(2))
    drawn = key_weights(q_ranks, k_ranks, settings, torch.arange(runs), causal)[0]  # one seed a head
    visible = torch.ones(n, n).tril() > 0 if causal else torch.ones(n, n) > 0
    assert drawn[:, ~visible].count_nonzero() == 0
    mean, spread = drawn[:, visible].mean(0), drawn[:, visible].std(0)
    # the seeds are fixed, so that no rare draw fails this; the average of thousands is within a percent
    assert ((mean - 1).abs() <= 6 * (spread + 0.1) / math.sqrt(runs)).all()
    assert (mean.mean() - 1).abs() < 0.01


def test_numerator_and_denominator_are_unbiased() -> None:
    (q, k, v), seeds, *_ = HyperProblem(128, heads=1, dtype=F64, options={"format": "bhsd"}).make(CPU)
    ranks = (x.expand(1, 500, 128) for x in hash_ranks(q, k, seeds[0], SMALL.projections))
    exact = (q @ k.mT / 4).exp().tril().detach()
    weighted = key_weights(*ranks, SMALL, torch.arange(500), True) * exact
    for of_rows in (lambda w: w.sum(-1, keepdim=True), lambda w: w @ v.detach()):
        drawn, true = of_rows(weighted)[:, :, 32:], of_rows(exact)[:, :, 32:]
        projected = (drawn * true).sum((2, 3)) / true.square().sum()  # one number a seed, 1 on average
        assert (projected.mean() - 1).abs() <= 5 * projected.std() / math.sqrt(500)
        assert projected.std() > 1e-3


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_function(causal: bool) -> None:
    settings = HyperSettings(bucket=16, samples=3, projections=4, shortest=16, window=0, sinks=0)
    inputs, seeds, *_ = HyperProblem(37, dim=3, dtype=F64, options={"format": "bhsd"}).make(CPU)
    ranks = hash_ranks(inputs[0], inputs[1], seeds[0], settings.projections)

    def attend(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return reference_hyper_attention(*qkv, settings, *seeds, causal=causal, format="bhsd", ranks=ranks)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_ties_take_the_middle_bucket() -> None:
    settings = replace(SMALL, samples=1, window=0, sinks=0)
    ranks = torch.zeros(1, 1, 256, dtype=torch.int32)
    weights = key_weights(ranks, ranks, settings, torch.tensor([0]), True)[0, 0]
    own = (weights[200, :128] == 1).nonzero().flatten()  # eight buckets of equal keys, in order of positions
    assert own.tolist() == list(range(64, 80))


def test_a_hash_that_only_one_bucket_holds_takes_that_bucket() -> None:
    settings = replace(SMALL, samples=1, window=0, sinks=0)
    k_ranks = (torch.randperm(128) // 16 * 16).int().view(1, 1, -1).repeat(1, 1, 2)
    q_ranks = torch.full((1, 1, 256), 48, dtype=torch.int32)
    weights = key_weights(q_ranks, k_ranks, settings, torch.tensor([0]), True)[0, 0]
    assert ((weights[200, :128] == 1) == (k_ranks[0, 0, :128] == 48)).all()


@pytest.mark.parametrize("length", [33, 64, 100, 511, 512, 513])
def test_intervals_tile_the_past_and_are_complete_before_their_readers(length: int) -> None:
    covered = torch.zeros(length, length, dtype=torch.int64)
    for level in levels(SMALL, length, causal=True):
        for interval in range(level.count):
            start, (first, stop) = level.start(interval), level.readers(interval, length)
            assert start + level.size <= first < stop
            covered[first:stop, start : start + level.size] += 1
    own = torch.arange(length) // SMALL.shortest
    assert covered.equal((own[:, None] > own[None, :]).long())


def test_window_and_sinks_are_exact() -> None:
    exact = exact_keys(SMALL, 300, True, CPU)
    query, key = torch.arange(300)[:, None], torch.arange(300)[None, :]
    assert exact[((query - key >= 0) & (query - key <= SMALL.window)) | ((key < SMALL.sinks) & (key <= query))].all()
    assert not exact[key > query].any()
    assert exact.float().mean() < 0.3


def test_queries_are_hashed_as_the_keys_of_their_kv_head() -> None:
    k = torch.randn(2, 3, 40, 16)
    of_queries, of_keys = hash_ranks(k.repeat_interleave(2, 1), k, torch.arange(3), 12)
    assert of_queries.equal(of_keys.repeat_interleave(2, 1))


def test_random_numbers_follow_from_seed_and_counter_alone() -> None:
    seeds = torch.randint(1 << 62, (64, 1))
    values = uniform(seeds, torch.arange(1000))
    assert values[5:6].equal(uniform(seeds[5:6], torch.arange(1000)))
    assert ((values >= 0) & (values < 1)).all()
    assert abs(values.mean() - 0.5) < 6 * 0.289 / math.sqrt(values.numel())
    assert abs(torch.corrcoef(values)[0, 1:].mean()) < 0.05
    directions = projections(seeds[:, 0], 64, 16)
    assert abs(directions.mean()) < 6 / math.sqrt(directions.numel())
    assert abs(directions.std() - 1) < 0.02


@pytest.mark.parametrize(("size", "samples"), [(32, 8), (100, 7), (50, 64)])
def test_samples_are_distinct_and_one_of_each_stratum(size: int, samples: int) -> None:
    slots, sizes = sample_slots(torch.arange(50), 2, 1, size, samples)
    assert sizes.sum() == size
    assert (slots.diff(dim=-1) > 0).all()
    assert (torch.bucketize(slots, sizes.cumsum(0), right=True) == torch.arange(min(samples, size))).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bucket": 48}, "power of two"),
        ({"shortest": 8}, "power of two"),
        ({"bucket": 64}, "larger than the shortest interval"),
        ({"samples": 0}, "samples"),
        ({"projections": 31}, "projections"),
        ({"window": 20}, "window"),
        ({"sinks": 64}, "sinks"),
    ],
)
def test_settings_that_do_not_fit_are_rejected(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(70, 1, 3, 16)}, "not a multiple"),
        ({"q": torch.randn(70, 1, 4, 8)}, "shapes don't match"),
        ({"k": torch.randn(60, 1, 2, 16)}, "shapes don't match"),
        ({"v": torch.randn(70, 1, 2, 16).double()}, "one dtype"),
        ({"projection_seeds": torch.arange(4)}, "projection_seeds"),
        ({"sample_seeds": torch.arange(2).int()}, "sample_seeds"),
        ({"softmax_scale": 0.0}, "softmax_scale"),
        ({"format": "hbsd"}, "format"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(change: dict, words: str) -> None:
    arguments = {
        "q": torch.randn(70, 1, 4, 16),
        "k": torch.randn(70, 1, 2, 16),
        "v": torch.randn(70, 1, 2, 16),
        "projection_seeds": torch.arange(2),
        "sample_seeds": torch.arange(2),
    }
    with pytest.raises(ValueError, match=words):
        hyper_attention(settings=SMALL, **(arguments | change))
