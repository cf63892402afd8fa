from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.reachability import direct_heads, distance_table, reach
from s2train.attention.registry import LETTERS
from s2train.errors import ConfigError
from s2train.layouts.patterns import Pattern
from s2train.layouts.schedules import SCHEDULES
from tests.layouts.layout_cases import make_hybrid, patterns, union_of

layers_of_heads = st.lists(st.lists(patterns, min_size=1, max_size=3), min_size=1, max_size=5)


def hybrid_of(layers: list[list[Pattern]], block_size: int) -> HybridLayout:
    kind = LETTERS["S"]
    return HybridLayout(
        tuple(LayerLayout(kind, tuple(heads), block_size) for heads in layers), block_size, 1, SCHEDULES["shifted"]
    )


def search(hybrid: HybridLayout, seq_length: int, key: int, query: int, first: int) -> int | None:
    """Breadth-first over (position, layers gone through), token by token, from `key` below layer `first`."""
    size = hybrid.block_size
    seen = [union_of(layer.heads, layer.num_blocks(seq_length)) for layer in hybrid.layers]
    states, queue = {(key, 0)}, deque([(key, 0)])
    while queue:
        position, used = queue.popleft()
        if position == query:
            return used
        if first + used == len(hybrid.layers):
            continue
        hops = [i for i in range(position, seq_length) if seen[first + used][i // size, position // size]]
        for state in ((i, used + 1) for i in {position, *hops}):
            if state not in states:
                states.add(state)
                queue.append(state)
    return None


@settings(deadline=None, max_examples=60)
@given(layers_of_heads, st.integers(1, 3), st.integers(1, 26), st.data())
def test_layers_needed_equal_a_search_token_by_token(
    layers: list[list[Pattern]], block_size: int, seq_length: int, data: st.DataObject
) -> None:
    hybrid = hybrid_of(layers, block_size)
    query = data.draw(st.integers(0, seq_length - 1))
    key = data.draw(st.integers(0, seq_length - 1))
    found = reach(hybrid, seq_length, query)
    starts = [search(hybrid, seq_length, key, query, first) for first in range(len(layers))]
    assert found.layers_from_first(key) == starts[0]
    lasts = (len(layers) - first for first in reversed(range(len(layers))) if starts[first] is not None)
    assert found.layers_from_last(key) == (0 if key == query else next(lasts, None))


def test_a_dense_layer_brings_everything_at_once() -> None:
    found = reach(make_hybrid("D", num_layers=3, num_heads=2), 1000, 777)
    assert [found.layers_from_first(key) for key in (0, 400, 776, 777, 778)] == [1, 1, 1, 0, None]


def test_what_only_a_later_dense_layer_brings_waits_for_it() -> None:
    # Two blocks of window, no columns within the sequence but block 0: six blocks back want the dense layer.
    hybrid = make_hybrid("S3D1", num_layers=4, num_heads=2, kind="homogeneous", local=2, stride=1000)
    found = reach(hybrid, 10 * 16)
    assert found.layers_from_first(3 * 16) == 4
    assert found.layers_from_last(3 * 16) == 1


def test_a_window_alone_goes_one_window_farther_a_layer() -> None:
    hybrid = make_hybrid("S", num_layers=3, num_heads=1, kind="homogeneous", local=4, stride=10_000)
    found = reach(hybrid, 20 * 16)
    assert found.from_first.tolist() == [1] + [-1] * 9 + [3] * 3 + [2] * 3 + [1] * 4


def test_a_query_that_begins_its_block_sees_no_other_token_of_it() -> None:
    hybrid = make_hybrid("D", num_layers=1, num_heads=1)
    assert reach(hybrid, 64, 32).from_first.tolist() == [1, 1, 0, -1]
    assert reach(hybrid, 64, 33).from_first.tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("query", [-1, 64])
def test_a_position_outside_the_sequence_is_rejected(query: int) -> None:
    with pytest.raises(ConfigError, match="query="):
        reach(make_hybrid("D", num_layers=1, num_heads=1), 64, query)


def test_the_table_tells_shares_by_distance() -> None:
    hybrid = make_hybrid("S", num_layers=2, num_heads=1, kind="homogeneous", local=1, stride=10_000, block_size=16)
    rows = distance_table(reach(hybrid, 64))
    assert [(row.nearest, row.farthest) for row in rows] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63)]
    assert [row.within for row in rows] == [(1,), (1,), (1,), (1,), (0,), (0.5,)]


@given(layers_of_heads, st.integers(1, 60))
def test_shares_never_fall_with_more_layers(layers: list[list[Pattern]], seq_length: int) -> None:
    for row in distance_table(reach(hybrid_of(layers, 2), seq_length)):
        assert list(row.within) == sorted(row.within)
        assert all(0 <= share <= 1 for share in row.within)


def test_a_long_deep_model_takes_well_under_the_time_of_whole_matrices() -> None:
    hybrid = make_hybrid("S", num_layers=32, num_heads=4, kind="homogeneous", local=8, stride=10_000, block_size=64)
    found = reach(hybrid, 131_072)
    blocks = torch.arange(2048)
    hops = (2047 - blocks + 6) // 7
    expected = torch.where(hops <= 32, hops.clamp(min=1), -1)
    expected[0] = 1  # the one column
    assert torch.equal(found.from_first, expected)


@settings(deadline=None, max_examples=60)
@given(layers_of_heads, st.integers(1, 3), st.integers(1, 26), st.data())
def test_direct_heads_are_those_whose_masks_keep_all_keys_for_the_query(
    layers: list[list[Pattern]], block_size: int, seq_length: int, data: st.DataObject
) -> None:
    hybrid = hybrid_of(layers, block_size)
    query = data.draw(st.integers(0, seq_length - 1))
    keys = data.draw(st.lists(st.integers(0, query), min_size=1, max_size=3))
    num_blocks = -(-seq_length // block_size)
    masks = [union_of([head], num_blocks) for heads in layers for head in heads]
    expected = sum(all(mask[query // block_size, key // block_size] for key in keys) for mask in masks)
    assert direct_heads(hybrid, query, keys) == expected


def test_of_a_shifted_layers_heads_one_in_a_stride_sees_a_far_key() -> None:
    hybrid = make_hybrid("SD", num_layers=2, num_heads=8, stride=8)
    assert direct_heads(hybrid, 64 * hybrid.block_size - 1, [5 * hybrid.block_size]) == 1 + 8
