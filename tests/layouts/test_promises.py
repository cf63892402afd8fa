"""Wherever a schedule promises that every block is seen, whole masks agree: over tensor parallel ranks and layers."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.attention.coverage import check_coverage, coverage_report
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.config import LayoutConfig, PatternConfig
from s2train.errors import ConfigError
from s2train.layouts.schedules import SCHEDULES
from tests.layouts.layout_cases import make_hybrid

WINDOW = {"kind": "sliding_window", "window": 2}
divisors = st.sampled_from([1, 2, 4])


@st.composite
def patterns_up_to(draw: st.DrawFn, widest: int) -> PatternConfig:
    """Settings whose period is `widest` at most, and often that."""
    local, stride = draw(st.integers(1, 5)), draw(st.one_of(st.just(widest), st.integers(1, widest)))
    kind = draw(st.sampled_from(["local_vertical", "ranges", "dilated"]))
    if kind == "ranges":
        inner = draw(st.integers(1, stride))
        return PatternConfig(kind, ranges=[[local, 1], [local + draw(st.integers(1, 9)), inner], [None, stride]])
    if kind == "dilated":
        return PatternConfig(kind, local=local, dilation=stride)
    return PatternConfig(local=local, stride=stride, sinks=draw(st.integers(0, 3)))


def seen_by_ranks(layer: LayerLayout, num_blocks: int, tp: int) -> torch.Tensor:
    """Bool [n, n]: kept by any head of any rank, from the layouts that the ranks run with."""
    size = len(layer.heads) // tp
    ranks = [
        layer.block_layout(num_blocks * layer.block_size, heads=slice(first, first + size))
        for first in range(0, len(layer.heads), size)
    ]
    return torch.cat([rank.mask() for rank in ranks]).any(0)


@settings(max_examples=60)
@given(st.sampled_from(sorted(SCHEDULES)), divisors, divisors, st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_promised_coverage_is_there(
    kind: str, tp: int, groups_of_rank: int, group_size: int, run: int, data: st.DataObject
) -> None:
    groups = tp * groups_of_rank
    schedule = SCHEDULES[kind]
    widest = schedule.widest_stride(groups * group_size, groups, run)
    hybrid = make_hybrid(
        f"DS{run}",
        num_layers=2 * (run + 1),
        num_heads=groups * group_size,
        num_query_groups=groups,
        kind=kind,
        pattern=data.draw(patterns_up_to(widest)),
    )
    num_blocks = data.draw(st.integers(1, 2 * widest + 20))
    causal = torch.ones(num_blocks, num_blocks, dtype=torch.bool).tril()
    sparse = [layer for layer in hybrid.layers if not layer.is_dense]
    seen = [seen_by_ranks(layer, num_blocks, tp) for layer in sparse]
    for first in range(0, len(sparse), run):
        union = torch.stack(seen[first : first + run]).any(0)
        for mask in [union] if schedule.per_run else seen[first : first + run]:
            assert torch.equal(mask, causal)
    check_coverage(hybrid, num_blocks * hybrid.block_size, LayoutConfig())


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(2, 8), st.integers(1, 7), st.integers(2, 40))
def test_a_dense_head_completes_any_layer(kind: str, heads: int, dense: int, stride: int) -> None:
    hybrid = make_hybrid(
        "DSS", num_layers=3, num_heads=heads, kind=kind, stride=stride, dense_heads=min(dense, heads - 1)
    )
    report = check_coverage(hybrid, 50 * hybrid.block_size, LayoutConfig())
    number = min(dense, heads - 1)
    assert f"100 % of the causal blocks seen in each layer, by {number} dense head" in report.format()


def test_an_explicit_schedule_is_held_to_each_layer_or_with_a_list_a_layer_to_its_run() -> None:
    def hybrid(offsets: list) -> HybridLayout:
        return make_hybrid("DSS", num_layers=3, num_heads=2, stride=4, kind="explicit", offsets=offsets)

    check_coverage(hybrid([[0, 2], [1, 3]]), 1024, LayoutConfig())
    with pytest.raises(ConfigError, match=r"layer 1 .*schedule.kind=rotating"):
        check_coverage(hybrid([0, 2]), 1024, LayoutConfig())
    with pytest.raises(ConfigError, match="layers 1-2"):
        check_coverage(hybrid([[0, 2], [1, 2]]), 1024, LayoutConfig())


def test_a_window_is_completed_by_the_layers_beside_it() -> None:
    beside = make_hybrid("DSW", num_layers=6, num_heads=4, stride=4, patterns={"W": WINDOW})
    report = check_coverage(beside, 1024, LayoutConfig())
    assert not report.runs[0].layers[1].complete
    assert report.runs[0].union.complete


def test_a_window_alone_is_rejected_with_what_helps_it() -> None:
    alone = make_hybrid("DWDS", num_layers=4, num_heads=4, stride=4, patterns={"W": WINDOW})
    with pytest.raises(ConfigError) as error:
        check_coverage(alone, 1024, LayoutConfig())
    assert "the heads of layer 1 (window 2) see" in error.value.problem
    assert error.value.remedy.startswith("Set layout.patterns.W.kind=local_vertical")
    assert "schedule.kind" not in error.value.remedy
    assert "schedule.dense_heads=1" in error.value.remedy


def test_a_stripe_too_wide_beside_a_window_is_rejected_by_itself() -> None:
    hybrid = make_hybrid("DSW", num_layers=3, num_heads=4, stride=8, patterns={"W": WINDOW})
    with pytest.raises(ConfigError, match=r"layer 1 \(local 2, stride 8\)"):
        check_coverage(hybrid, 1024, LayoutConfig())


@pytest.mark.parametrize(
    ("pattern", "way"),
    [
        (PatternConfig("ranges", ranges=[[2, 1], [8, 4], [None, 8]]), "layout.pattern.ranges with strides of 4"),
        (PatternConfig("dilated", dilation=8), "layout.pattern.dilation=4 or less"),
        (PatternConfig(stride=8), "layout.pattern.stride=4 or less"),
    ],
)
def test_the_remedy_names_the_patterns_own_setting(pattern: PatternConfig, way: str) -> None:
    hybrid = make_hybrid("DS", num_layers=2, num_heads=4, pattern=pattern)
    with pytest.raises(ConfigError) as error:
        check_coverage(hybrid, 1024, LayoutConfig())
    assert way in error.value.remedy


@pytest.mark.parametrize("other", ["local_vertical", "dilated"])
@pytest.mark.parametrize(
    "pattern",
    [
        PatternConfig(local=16, stride=32),
        PatternConfig("ranges", ranges=[[16, 1], [256, 8], [None, 32]]),
        PatternConfig("dilated", local=16, dilation=32),
    ],
    ids=lambda pattern: pattern.kind,
)
def test_a_model_of_32_layers_and_heads_at_128k_tokens_is_judged_at_once(pattern: PatternConfig, other: str) -> None:
    hybrid = make_hybrid(
        "DSSW",
        num_layers=32,
        num_heads=32,
        num_query_groups=8,
        kind="rotating",
        block_size=64,
        pattern=pattern,
        patterns={"W": {"kind": "dilated", "dilation": 32} if other == "dilated" else {"stride": 32}},
    )
    started = time.process_time()
    report = coverage_report(hybrid, 131_072)
    assert time.process_time() - started < 2
    assert report.num_blocks == 2048
