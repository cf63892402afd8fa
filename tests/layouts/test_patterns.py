from itertools import pairwise
from math import lcm

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.patterns import (
    BandedPattern,
    Dense,
    Dilated,
    GlobalBlocks,
    LocalVertical,
    MaskPattern,
    Pattern,
    Ranges,
    SlidingWindow,
    Span,
)
from s2train.layouts.patterns.base import PatternError
from tests.layouts.layout_cases import (
    banded_patterns,
    dilated,
    global_blocks,
    local_verticals,
    mask_of,
    masks,
    patterns,
    ranges,
    spans,
    union_of,
    windows,
)


def pairs(num_blocks: int) -> list[tuple[int, int]]:
    """Causal (query block, key block)."""
    return [(i, j) for i in range(num_blocks) for j in range(i + 1)]


def never_takes_up_again(mask: Tensor) -> bool:
    """Is no column of bool [n, n] kept again once it was dropped?"""
    return all(bool((mask[j:, j].int().diff() <= 0).all()) for j in range(len(mask)))


@given(local_verticals, st.integers(1, 40))
def test_local_vertical_keeps_window_columns_and_sinks_and_nothing_else(
    pattern: LocalVertical, num_blocks: int
) -> None:
    mask = mask_of(pattern, num_blocks)
    for i, j in pairs(num_blocks):
        far = (j - pattern.offset) % pattern.stride == 0 or j < pattern.sinks
        assert mask[i, j].item() == (i - j < pattern.local or far)


@given(ranges, st.integers(1, 40))
def test_ranges_keep_the_columns_of_the_first_range_that_the_distance_is_in(pattern: Ranges, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    for i, j in pairs(num_blocks):
        stride = next(stride for limit, stride in pattern.ranges if limit is None or i - j < limit)
        assert mask[i, j].item() == (i == j or (j - pattern.offset) % stride == 0 or j < pattern.sinks)


@given(windows, st.integers(1, 40))
def test_a_sliding_window_keeps_itself_and_sinks(pattern: SlidingWindow, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    assert all(mask[i, j].item() == (i - j < pattern.window or j < pattern.sinks) for i, j in pairs(num_blocks))


@given(spans, st.integers(1, 40))
def test_a_span_keeps_a_share_of_what_is_before_the_query_and_sinks(pattern: Span, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    for i, j in pairs(num_blocks):
        assert mask[i, j].item() == (i - j < pattern.base + int(pattern.slope * (i + 1)) or j < pattern.sinks)


@given(spans, st.integers(1, 40), st.integers(1, 40))
def test_a_prefix_is_attended_as_in_a_longer_sequence(pattern: Span, few: int, more: int) -> None:
    assert torch.equal(mask_of(pattern, few), mask_of(pattern, few + more)[:few, :few])


@given(global_blocks, st.integers(1, 40))
def test_global_blocks_are_kept_by_every_query(pattern: GlobalBlocks, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    assert all(mask[i, j].item() == (i - j < pattern.local or j in pattern.blocks) for i, j in pairs(num_blocks))


@given(dilated, st.integers(1, 40))
def test_dilated_keeps_distances_at_its_gap_up_to_its_window(pattern: Dilated, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    for i, j in pairs(num_blocks):
        far = (i - j - pattern.offset) % pattern.dilation == 0 and (pattern.window is None or i - j < pattern.window)
        assert mask[i, j].item() == (i - j < pattern.local or far)


def test_dense_keeps_the_lower_triangle() -> None:
    assert torch.equal(mask_of(Dense(), 9), torch.ones(9, 9, dtype=torch.bool).tril())


@given(st.integers(1, 40), st.data())
def test_a_mask_pattern_keeps_its_mask_at_any_shorter_length(num_blocks: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, num_blocks))
    mask = np.tril(np.random.default_rng(data.draw(st.integers(0))).random((num_blocks, num_blocks)) < 0.5)
    np.fill_diagonal(mask, True)
    pattern = MaskPattern.of(mask, "some.npz", "layout.pattern")
    assert torch.equal(mask_of(pattern, length), torch.from_numpy(mask[:length, :length]))
    assert pattern == MaskPattern.of(mask.copy(), "some.npz", "layout.pattern")


@given(patterns, st.integers(1, 40))
def test_every_pattern_is_causal_and_keeps_the_diagonal(pattern: Pattern, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


@given(patterns, st.integers(0, 12), st.integers(1, 40))
def test_a_shifted_pattern_is_one_too_and_comes_back_after_its_period(
    pattern: Pattern, offset: int, num_blocks: int
) -> None:
    shifted = pattern.shifted(offset)
    assert mask_of(shifted, num_blocks).diagonal().all()
    assert shifted == pattern.shifted(offset % pattern.period)
    assert shifted.form() == pattern.form()


@given(st.one_of(local_verticals, ranges, dilated.filter(lambda pattern: pattern.window is None)))
def test_all_offsets_of_a_pattern_see_everything_together(pattern: Pattern) -> None:
    every = [pattern.shifted(offset) for offset in range(pattern.period)]
    assert torch.equal(union_of(every, 40), mask_of(Dense(), 40))


@given(banded_patterns)
def test_a_banded_pattern_is_columns_within_bands_of_distance(pattern: BandedPattern) -> None:
    key = torch.arange(40)
    distance = key[:, None] - key[None, :]
    expected = torch.zeros(40, 40, dtype=torch.bool)
    for band, (start, stop) in enumerate(pairwise([0, *pattern.limits, 40])):
        expected |= (distance >= start) & (distance < stop) & pattern.columns(band, key)
    assert torch.equal(mask_of(pattern, 40), expected)


@given(st.one_of(banded_patterns, dilated))
def test_kv_efficient_says_whether_a_dropped_key_block_is_ever_taken_up_again(pattern: Pattern) -> None:
    # Long enough for every range, and a common multiple of two strides, to show.
    assert pattern.kv_efficient == never_takes_up_again(mask_of(pattern, 100))


@given(masks)
def test_a_mask_is_kv_efficient_if_its_columns_never_come_back(pattern: MaskPattern) -> None:
    assert pattern.kv_efficient == never_takes_up_again(mask_of(pattern, pattern.num_blocks))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 5))
def test_ranges_are_kv_efficient_if_and_only_if_each_stride_divides_the_next(strides: list[int], width: int) -> None:
    limits = [width * (number + 1) for number in range(len(strides))]
    pattern = Ranges(
        ((1, 1), *zip([limit + 1 for limit in limits[:-1]], strides, strict=False), (None, strides[-1])), 0
    )
    divide = all(after % before == 0 for before, after in pairwise(strides))
    assume(limits[-1] + lcm(*strides) < 100)
    assert pattern.kv_efficient == divide == never_takes_up_again(mask_of(pattern, 100))


@given(patterns, st.integers(1, 40))
def test_counts_are_those_of_the_mask(pattern: Pattern, num_blocks: int) -> None:
    assert torch.equal(kept_key_blocks([pattern], num_blocks), mask_of(pattern, num_blocks).sum(1))


@given(patterns)
def test_keep_broadcasts_and_is_bool(pattern: Pattern) -> None:
    query, key = torch.arange(6).view(2, 3, 1), torch.arange(5)
    kept = pattern.keep(query, key)
    assert kept.shape == (2, 3, 5)
    assert kept.dtype == torch.bool


def test_offsets_count_modulo_the_stride() -> None:
    assert LocalVertical(2, 8, -1) == LocalVertical(2, 8, 7)
    assert len({LocalVertical(2, 8, 3), LocalVertical(2, 8, 11)}) == 1


@pytest.mark.parametrize(
    ("setting", "make"),
    [
        ("local", lambda: LocalVertical(0, 4, 0)),
        ("stride", lambda: LocalVertical(2, 0, 0)),
        ("sinks", lambda: LocalVertical(2, 4, 0, -1)),
        ("window", lambda: SlidingWindow(0)),
        ("globals", lambda: GlobalBlocks(1, (-1,))),
        ("dilation", lambda: Dilated(1, 0, 0)),
        ("window", lambda: Dilated(4, 2, 0, 3)),
        ("ranges", lambda: Ranges((), 0)),
        ("ranges", lambda: Ranges(((4, 1),), 0)),
        ("ranges", lambda: Ranges(((4, 1), (4, 2), (None, 4)), 0)),
        ("ranges", lambda: Ranges(((None, 1), (None, 2)), 0)),
        ("ranges", lambda: Ranges(((4, 0), (None, 2)), 0)),
        ("ranges", lambda: Ranges.read("16:1", 0)),
        ("ranges", lambda: Ranges.read([[16, 1, 2], [None, 2]], 0)),
        ("ranges", lambda: Ranges.read([[16, True], [None, 2]], 0)),
    ],
)
def test_a_pattern_that_cannot_be_is_rejected_by_its_setting(setting: str, make: st.SearchStrategy) -> None:
    with pytest.raises(PatternError, match=f"^{setting}="):
        make()


@given(st.lists(patterns, min_size=2, max_size=2))
def test_descriptions_tell_patterns_apart(two: list[Pattern]) -> None:
    assume(not any(isinstance(pattern, GlobalBlocks) for pattern in two))  # long lists are cut
    assert (two[0].describe() == two[1].describe()) == (two[0] == two[1])
