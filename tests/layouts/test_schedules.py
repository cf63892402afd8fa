from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2train.config import ScheduleConfig
from s2train.errors import ConfigError
from s2train.layouts.patterns import Dense, LocalVertical
from s2train.layouts.schedules import SCHEDULES, ScheduleContext, dense_head_numbers, find_schedule
from tests.layouts.layout_cases import make_hybrid

kinds = st.sampled_from(sorted(SCHEDULES))


def offsets(kind: str, heads: int, groups: int, stride: int, layer: int = 0) -> tuple[int, ...]:
    return SCHEDULES[kind].offsets(ScheduleContext(heads, groups, stride, layer))


@pytest.mark.parametrize(
    ("kind", "heads", "groups", "stride", "layer", "expected"),
    [
        ("shifted", 4, 4, 3, 0, (0, 1, 2, 0)),
        ("strided", 4, 4, 10, 0, (0, 2, 5, 7)),
        ("strided", 4, 4, 2, 0, (0, 0, 1, 1)),
        ("grouped", 4, 2, 6, 0, (0, 0, 3, 3)),
        ("grouped", 8, 4, 2, 0, (0, 0, 1, 1, 0, 0, 1, 1)),
        ("rotating", 4, 2, 6, 0, (0, 0, 1, 1)),
        ("rotating", 4, 2, 6, 2, (4, 4, 5, 5)),
        ("rotating", 4, 2, 3, 1, (2, 2, 0, 0)),
        ("homogeneous", 3, 3, 8, 5, (0, 0, 0)),
    ],
)
def test_offsets_of_each_kind(
    kind: str, heads: int, groups: int, stride: int, layer: int, expected: tuple[int, ...]
) -> None:
    assert offsets(kind, heads, groups, stride, layer) == expected


@given(kinds, st.integers(1, 8), st.integers(1, 4), st.integers(1, 30), st.integers(0, 40))
def test_every_head_gets_an_offset_below_the_stride(
    kind: str, groups: int, group_size: int, stride: int, layer: int
) -> None:
    got = offsets(kind, groups * group_size, groups, stride, layer)
    assert len(got) == groups * group_size
    assert all(0 <= offset < stride for offset in got)


@given(kinds, st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(0, 40), st.data())
def test_all_offsets_occur_up_to_the_widest_stride_and_not_beyond(
    kind: str, groups: int, group_size: int, run: int, first: int, data: st.DataObject
) -> None:
    heads, schedule = groups * group_size, SCHEDULES[kind]
    widest = schedule.widest_stride(heads, groups, run)
    stride = data.draw(st.integers(1, widest + 10))
    layers = range(first, first + run)
    per_layer = [set(offsets(kind, heads, groups, stride, layer)) for layer in layers]
    seen = [set().union(*per_layer)] if schedule.per_run else per_layer
    assert all((some == set(range(stride))) == (stride <= widest) for some in seen)


@given(st.sampled_from(["grouped", "rotating"]), st.integers(1, 8), st.integers(1, 4), st.integers(1, 30))
def test_query_heads_of_a_kv_head_share_its_offset(kind: str, groups: int, group_size: int, stride: int) -> None:
    got = offsets(kind, groups * group_size, groups, stride, layer=3)
    assert all(got[head] == got[head // group_size * group_size] for head in range(len(got)))


@given(st.integers(1, 40), st.integers(1, 40))
def test_strided_offsets_spread_evenly_over_the_stride(heads: int, stride: int) -> None:
    got = offsets("strided", heads, heads, stride)
    if heads <= stride:
        gaps = [after - before for before, after in zip(got, [*got[1:], got[0] + stride], strict=True)]
        assert max(gaps) - min(gaps) <= 1
    else:
        counts = [got.count(offset) for offset in range(stride)]
        assert max(counts) - min(counts) <= 1


def test_an_unknown_kind_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"schedule.kind=shiffted: .* Did you mean shifted\?"):
        find_schedule(ScheduleConfig("shiffted"))


def explicit(given: Any, heads: int, stride: int, layer: int = 0) -> tuple[int, ...]:
    return find_schedule(ScheduleConfig("explicit", given)).offsets(ScheduleContext(heads, heads, stride, layer))


def test_explicit_offsets_are_those_listed() -> None:
    assert explicit([3, 0, 2], 3, 4) == explicit([3, 0, 2], 3, 4, layer=5) == (3, 0, 2)


def test_explicit_lists_a_sparse_layer_are_repeated() -> None:
    assert [explicit([[0, 1], [2, 3]], 2, 4, layer) for layer in range(3)] == [(0, 1), (2, 3), (0, 1)]


@pytest.mark.parametrize(
    ("given", "telling"),
    [
        (None, "not a list of numbers"),
        ([], "not a list of numbers"),
        ([[]], "not a list of numbers"),
        ([[0, 1], 2], "not a list of numbers"),
        ([0, 1.5], "not a list of numbers"),
        ([0, True], "not a list of numbers"),
        ("0,1", "not a list of numbers"),
        ([0, 1, 2], "3 offsets for 2 query heads"),
        ([0, 4], "out of range"),
        ([-1, 0], "out of range"),
    ],
)
def test_offsets_that_cannot_be_are_rejected(given: Any, telling: str) -> None:
    with pytest.raises(ConfigError, match=rf"^schedule.offsets.*{telling}"):
        explicit(given, 2, 4)


def test_offsets_of_another_kind_are_rejected() -> None:
    with pytest.raises(ConfigError, match=r"^schedule.offsets=.*schedule.kind=explicit"):
        find_schedule(ScheduleConfig("shifted", [0, 1]))


def test_lists_that_do_not_divide_the_sparse_layers_are_rejected() -> None:
    rows = [[0, 1], [2, 3]]
    assert make_hybrid("DSS", num_layers=6, num_heads=2, kind="explicit", offsets=rows)
    with pytest.raises(ConfigError, match=r"schedule.offsets.*3 sparse layers"):
        make_hybrid("DSSS", num_layers=4, num_heads=2, kind="explicit", offsets=rows)


@given(st.integers(2, 64).flatmap(lambda heads: st.tuples(st.just(heads), st.integers(0, heads - 1))), st.data())
def test_dense_heads_are_shared_evenly_by_kv_groups_and_ranks(sizes: tuple[int, int], data: st.DataObject) -> None:
    heads, count = sizes
    dense = dense_head_numbers(count, heads)
    assert len(dense) == count
    parts = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    size = heads // parts
    shares = [len(dense & set(range(first, first + size))) for first in range(0, heads, size)]
    assert max(shares) - min(shares) <= 1


def test_dense_heads_stand_in_every_sparse_layer_beside_the_schedules() -> None:
    _, sparse = make_hybrid("DS", num_layers=2, num_heads=4, local=2, stride=4, dense_heads=2).layers
    assert sparse.heads == (Dense(), LocalVertical(2, 4, 1), Dense(), LocalVertical(2, 4, 3))
    assert not sparse.is_dense


@pytest.mark.parametrize("count", [-1, 4, 5])
def test_dense_heads_are_fewer_than_the_heads(count: int) -> None:
    with pytest.raises(ConfigError, match=rf"^schedule.dense_heads={count}: .*4 heads"):
        make_hybrid("DS", num_layers=2, num_heads=4, dense_heads=count)
