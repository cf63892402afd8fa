"""Heads of unlike density are placed so that tensor parallel ranks have as much to do."""

import random
from collections import Counter

import numpy as np
import pytest

from s2train.attention.coverage import coverage_report
from s2train.attention.hybrid import HybridLayout, build_hybrid_layout
from s2train.config import LayoutConfig, PatternConfig, ScheduleConfig
from s2train.costs.attention import rank_spread
from s2train.layouts.patterns import Dense, LocalVertical, MaskPattern, SlidingWindow
from s2train.layouts.placement import balanced_order, place_balanced


def parts(order: tuple[int, ...], costs: list[int], ranks: int) -> list[int]:
    size = len(order) // ranks
    return [sum(costs[h] for h in order[r * size : (r + 1) * size]) for r in range(ranks)]


def test_every_member_is_placed_once() -> None:
    for count in (1, 2, 6, 7, 12, 32, 40):
        costs = [random.randint(1, 100) for _ in range(count)]
        assert sorted(balanced_order(costs)) == list(range(count))


def test_every_power_of_two_of_ranks_is_served_by_one_order() -> None:
    costs = [1000 if h in (0, 1, 2, 3, 4, 5, 6, 7) else 80 for h in range(32)]  # eight dense heads, all in front
    order = balanced_order(costs)
    for ranks in (2, 4, 8):
        assert len(set(parts(order, costs, ranks))) == 1


def test_random_costs_differ_by_less_than_five_percent_over_ranks() -> None:
    for _ in range(20):
        costs = [random.randint(50, 1000) for _ in range(64)]
        for ranks in (2, 4):
            found = parts(balanced_order(costs), costs, ranks)
            assert max(found) * ranks / sum(found) - 1 < 0.05


def test_groups_whose_heads_are_alike_stay_together() -> None:
    heads = [Dense()] * 8 + [SlidingWindow(4)] * 8 + [LocalVertical(4, 8, o // 4) for o in range(16)]
    placed = place_balanced(heads, num_query_groups=8)
    assert Counter(placed) == Counter(heads)
    for group in range(8):
        assert len(set(placed[group * 4 : group * 4 + 4])) == 1


def model(placement: str) -> HybridLayout:
    layout = LayoutConfig(layers="DSSS", block_size=64, pattern=PatternConfig(local=16, stride=8))
    offsets = [*range(8), *([0] * 8)]
    schedule = ScheduleConfig(kind="explicit", offsets=offsets, dense_heads=4, placement=placement)
    return build_hybrid_layout(layout, schedule, num_layers=4, num_heads=16, num_query_groups=8)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_balanced_schedule_evens_ranks_out_at_any_length(tp: int) -> None:
    for seq_length in (4096, 32768, 100_000):
        assert max(rank_spread(layer, seq_length, tp) for layer in model("balanced").layers) < 0.05


def test_masks_of_few_blocks_are_placed_by_what_they_keep_of_them() -> None:
    own, all_earlier = np.eye(8, dtype=bool), np.tri(8, dtype=bool)
    heads = [MaskPattern.of(mask, "masks.npz", "layout.pattern") for mask in (own, own, all_earlier, all_earlier)]
    placed = place_balanced(heads, num_query_groups=4)
    assert set(placed[:2]) == set(placed[2:]) == set(heads)


def test_placement_changes_neither_patterns_nor_coverage() -> None:
    found, plain = model("balanced"), model("as_is")
    for a, b in zip(found.layers, plain.layers, strict=True):
        assert Counter(a.heads) == Counter(b.heads)
    assert coverage_report(found, 16384).runs == coverage_report(plain, 16384).runs


def test_the_spread_is_that_of_the_busiest_rank() -> None:
    layout = LayoutConfig(layers="S", block_size=64, pattern=PatternConfig(local=4, stride=2))
    schedule = ScheduleConfig(kind="explicit", offsets=[0, 0, 1, 1])
    (layer,) = build_hybrid_layout(layout, schedule, num_layers=1, num_heads=4, num_query_groups=4).layers
    heads = layer.heads
    mixed = type(layer)(layer.kind, (Dense(), Dense(), heads[0], heads[0]), 64)
    causal = 8192 * 8193 // 2
    kept = rank_spread(mixed, 8192, 4)
    assert rank_spread(layer, 8192, 2) < 0.05
    assert rank_spread(mixed, 8192, 2) == pytest.approx(kept)  # the busier half holds the two busiest quarters
    assert 0 < kept < causal
