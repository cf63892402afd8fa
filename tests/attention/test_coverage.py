import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2train.attention.coverage import check_coverage, coverage_report, percent, shifts, union_coverage
from s2train.attention.hybrid import HybridLayout
from s2train.config import LayoutConfig, PatternConfig
from s2train.errors import ConfigError
from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.patterns import LocalVertical, Pattern
from s2train.layouts.schedules import SCHEDULES
from tests.layouts.layout_cases import banded_patterns, make_hybrid, patterns, union_of


def settings(stride: int, allow_partial_coverage: bool = False) -> LayoutConfig:
    return LayoutConfig(pattern=PatternConfig(stride=stride), allow_partial_coverage=allow_partial_coverage)


def union_fraction(hybrid: HybridLayout, numbers: range, num_blocks: int) -> float:
    heads = [head for number in numbers for head in hybrid.layers[number].heads]
    return union_of(heads, num_blocks).sum().item() / (num_blocks * (num_blocks + 1) // 2)


@given(st.lists(banded_patterns, min_size=1, max_size=5), st.integers(1, 40))
def test_kept_key_blocks_of_banded_patterns_equal_the_masks(heads: list[Pattern], num_blocks: int) -> None:
    assert torch.equal(kept_key_blocks(heads, num_blocks), union_of(heads, num_blocks).sum(1))


@given(st.lists(patterns, min_size=1, max_size=5), st.integers(1, 40))
def test_kept_key_blocks_of_any_patterns_equal_the_masks(heads: list[Pattern], num_blocks: int) -> None:
    assert torch.equal(kept_key_blocks(heads, num_blocks), union_of(heads, num_blocks).sum(1))


def test_union_coverage_is_the_share_of_causal_blocks_that_any_head_keeps() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=2, local=1, stride=4).layers[0]
    # Columns 0, 1 and 4 whole (6 + 5 + 2), and the diagonal of 2, 3 and 5: 16 of 21.
    assert union_coverage(layer.heads, 6).fraction == 16 / 21


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from(["S", "DSSS", "SSDS", "SDSS"]),
    st.integers(1, 4),
    st.integers(1, 2),
    st.integers(1, 12),
    st.integers(1, 24),
)
def test_the_report_equals_the_masks_layer_by_layer_and_run_by_run(
    kind: str, layers: str, groups: int, group_size: int, stride: int, num_blocks: int
) -> None:
    hybrid = make_hybrid(
        layers,
        num_layers=4,
        num_heads=groups * group_size,
        num_query_groups=groups,
        kind=kind,
        stride=stride,
    )
    report = coverage_report(hybrid, num_blocks * hybrid.block_size)
    sparse = "".join("-" if layer.is_dense else "S" for layer in hybrid.layers)
    assert [(run.first, run.last + 1) for run in report.runs] == [match.span() for match in re.finditer("S+", sparse)]
    for run in report.runs:
        numbers = range(run.first, run.last + 1)
        assert run.union.fraction == union_fraction(hybrid, numbers, num_blocks)
        assert [layer.fraction for layer in run.layers] == [
            union_fraction(hybrid, range(number, number + 1), num_blocks) for number in numbers
        ]


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.data())
def test_a_stride_within_the_schedules_promise_passes_and_a_wider_one_is_rejected(
    kind: str, groups: int, group_size: int, run: int, data: st.DataObject
) -> None:
    widest = SCHEDULES[kind].widest_stride(groups * group_size, groups, run)
    stride = data.draw(st.integers(1, widest + 4))
    hybrid = make_hybrid(
        f"DS{run}",
        num_layers=2 * (run + 1),
        num_heads=groups * group_size,
        num_query_groups=groups,
        kind=kind,
        local=1,
        stride=stride,
    )
    seq_length = hybrid.block_size * (stride + 2)
    if stride <= widest:
        check_coverage(hybrid, seq_length, settings(stride))
    else:
        with pytest.raises(ConfigError, match=f"schedule.kind={kind}"):
            check_coverage(hybrid, seq_length, settings(stride))


def test_the_error_names_missing_blocks_and_every_way_out() -> None:
    hybrid = make_hybrid("DSSS", num_layers=8, num_heads=16, kind="shifted", local=8, stride=24)
    with pytest.raises(ConfigError) as error:
        check_coverage(hybrid, 16 * 128, settings(24))
    assert error.value.problem == (
        "the heads of layer 1 (local 8, stride 24) see 74.5 % of the causal blocks at 2,048 tokens: "
        "query block 127 misses 40 of its 128 key blocks (16, 17, 18, 19, …)"
    )
    assert error.value.remedy == (
        "Set schedule.kind=rotating, or layout.pattern.stride=16 or less, or schedule.dense_heads=1, "
        "or layout.allow_partial_coverage=true to train without full coverage."
    )


def test_the_missing_blocks_of_the_error_are_missing() -> None:
    hybrid = make_hybrid("S", num_layers=2, num_heads=4, kind="strided", local=3, stride=11, sinks=2)
    with pytest.raises(ConfigError) as error:
        check_coverage(hybrid, 16 * 50, settings(11))
    found = re.search(r"query block (\d+) misses (\d+) .*\((.*), …\)", error.value.problem)
    assert found
    missing = (~union_of(hybrid.layers[0].heads, 50)[int(found[1])]).nonzero().flatten().tolist()
    assert len([j for j in missing if j <= int(found[1])]) == int(found[2])
    assert set(map(int, found[3].split(", "))) <= set(missing)


def test_runs_too_short_to_rotate_through_the_stride_are_rejected_with_the_length_that_would_do() -> None:
    hybrid = make_hybrid("DSS", num_layers=6, num_heads=8, num_query_groups=4, kind="rotating", stride=16)
    with pytest.raises(ConfigError, match=r"layers 1-2 .* see .* with 4 or more sparse layers in a row"):
        check_coverage(hybrid, 1024, settings(16))


def test_a_run_makes_up_for_its_layers_only_where_the_schedule_promises_it() -> None:
    hybrid = make_hybrid("DSS", num_layers=3, num_heads=4, kind="rotating", stride=8)
    report = check_coverage(hybrid, 1024, settings(8))
    run = report.runs[0]
    assert run.union.complete
    assert not any(layer.complete for layer in run.layers)
    assert "in each layer, 100 % in the run" in report.format()


def test_partial_coverage_passes_where_it_is_allowed_and_is_reported() -> None:
    hybrid = make_hybrid("DSSS", num_layers=8, num_heads=4, kind="homogeneous", stride=8)
    report = check_coverage(hybrid, 1024, settings(8, allow_partial_coverage=True))
    assert not any(run.complete for run in report.runs)
    layer = percent(report.runs[0].union.fraction)
    assert f"layers 1-3, 5-7: {layer} of the causal blocks seen" in report.format()


def test_a_model_without_sparse_layers_has_nothing_to_cover() -> None:
    report = check_coverage(make_hybrid("D", num_layers=2, num_heads=4), 1024, settings(4))
    assert report.runs == ()
    assert "no sparse layers" in report.format()


def test_a_long_wide_and_deep_model_is_checked_without_its_masks() -> None:
    # 32 layers × 32 heads × 16,384² blocks: 275 GB as masks.
    hybrid = make_hybrid("DSSS", num_layers=32, num_heads=32, local=16, stride=32, block_size=64)
    report = check_coverage(hybrid, 1 << 20, settings(32))
    assert report.num_blocks == 16384
    assert all(run.union.complete for run in report.runs)


@given(patterns, st.integers(1, 30))
def test_shifts_by_less_than_the_sequence_see_all_that_any_shift_sees(head: Pattern, num_blocks: int) -> None:
    every = [head.shifted(offset) for offset in range(head.period)]
    found = shifts(head, num_blocks)
    assert torch.equal(union_of(found, num_blocks), union_of(every, num_blocks))


def test_a_stride_far_beyond_the_sequence_needs_no_more_shifts_than_it_has_blocks() -> None:
    assert len(shifts(LocalVertical(8, 1 << 18, 0), 256)) == 256


def test_percent_says_100_only_of_all() -> None:
    assert [percent(fraction) for fraction in (0.5, 0.99999, 1.0)] == ["50.0 %", "99.9 %", "100 %"]
