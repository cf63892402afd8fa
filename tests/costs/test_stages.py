"""Pipeline stages have equally many layers, or equal work."""

import itertools
import random
from dataclasses import replace

import pytest

from s2train.config import ModelConfig, ParallelConfig
from s2train.costs.attention import attention_flops
from s2train.costs.stages import LayerFlops, Stages, balance, layer_flops, pipeline_stages
from s2train.planning import hybrid_layout
from s2train.planning.plan import make_plan
from s2train.planning.report import format_plan
from tests.planning.test_plan import H100, config

MODEL = ModelConfig("any", 8, 64, 96, 8, 4, vocab_size=64)


def by_cost(costs: LayerFlops, pp: int, vpp: int | None = None) -> Stages:
    model = replace(MODEL, num_layers=len(costs.layers))
    return pipeline_stages(model, ParallelConfig(pp=pp, vpp=vpp, pipeline_split="cost"), costs)


def chunk_costs(sizes: tuple[int, ...], costs: LayerFlops) -> list[int]:
    work = [*costs.layers[:-1], costs.layers[-1] + costs.head]
    ends = list(itertools.accumulate(sizes))
    return [sum(work[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def test_the_split_by_cost_has_the_least_busiest_stage_of_all_splits() -> None:
    rng = random.Random()
    for _ in range(20):
        layers, pp = rng.randint(4, 9), rng.randint(2, 4)
        costs = LayerFlops(tuple(rng.randint(1, 100) for _ in range(layers)), head=rng.randint(0, 100))
        every = (sizes for sizes in itertools.product(range(1, layers), repeat=pp) if sum(sizes) == layers)
        least = min(max(chunk_costs(sizes, costs)) for sizes in every)
        assert max(chunk_costs(by_cost(costs, pp).chunks, costs)) == least


def test_equal_layers_are_split_evenly() -> None:
    costs = LayerFlops((7,) * 12, head=0)
    assert by_cost(costs, 4).chunks == (3, 3, 3, 3)
    assert by_cost(costs, 2, vpp=3).of_rank(1) == (2, 2, 2)


def test_a_dense_layer_costs_its_dense_attention() -> None:
    cfg = config(MODEL, layers="DSSS")
    hybrid = hybrid_layout(cfg)
    costs = layer_flops(MODEL, hybrid, 4096)
    extra = attention_flops(hybrid.layers[0], 4096, 8) - attention_flops(hybrid.layers[1], 4096, 8)
    assert costs.layers[0] - costs.layers[1] == extra > 0
    assert costs.layers[:4] == costs.layers[4:]


def test_idle_time_is_that_of_the_published_bubble_where_stages_are_alike() -> None:
    for pp, vpp, micro_batches in ((4, 1, 8), (2, 2, 6), (8, 4, 16)):
        costs = LayerFlops((5,) * (pp * vpp), head=0)
        found = balance(by_cost(costs, pp, vpp), costs, micro_batches)
        assert found.imbalance == 0
        bubble = (pp - 1) / (
            vpp * micro_batches
        )  # over the time of the work itself: Narayanan et al., arXiv:2104.04473
        assert found.idle == pytest.approx(bubble / (1 + bubble), rel=1e-12)


def test_the_busiest_stage_sets_the_pace() -> None:
    costs = LayerFlops((30, 10, 10, 10), head=0)
    even = balance(Stages((2, 2), 2), costs, 1000)
    cost = balance(by_cost(costs, 2), costs, 1000)
    assert even.imbalance == pytest.approx(1 / 3)
    assert cost.stages.chunks == (1, 3)
    assert cost.imbalance == 0
    assert even.idle == pytest.approx(0.25, abs=1e-3)


def test_the_plan_shows_what_a_split_by_cost_would_gain() -> None:
    cfg = config(MODEL, layers="D2S6", pp=4)
    cfg.train.seq_length, cfg.layout.pattern.stride = 16384, 8
    even = make_plan(cfg, hybrid_layout(cfg), 4, H100)
    assert even.pipeline.stages.chunks == (2, 2, 2, 2)
    assert "with parallel.pipeline_split=cost" in format_plan(even)
    cfg.parallel.pipeline_split = "cost"
    cost = make_plan(cfg, hybrid_layout(cfg), 4, H100)
    assert cost.pipeline == even.pipeline_by_cost
    assert cost.pipeline.idle < even.pipeline.idle
    assert "split cost" in format_plan(cost)


def test_megatron_reads_the_layout() -> None:
    layout = pytest.importorskip("megatron.core.transformer.pipeline_parallel_layer_layout")
    stages = Stages((3, 1, 2, 2), pp=2)
    read = layout.PipelineParallelLayerLayout(stages.megatron_layout(), 2)
    read.validate_layer_layout(num_layers=8, mtp_num_layers=None)
    for rank in range(2):
        found = tuple(sum(part.name == "decoder" for part in chunk) for chunk in read.layout[rank])
        assert found == stages.of_rank(rank)
