import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2train.config import ScheduleConfig
from s2train.errors import ConfigError
from s2train.layouts.schedules import SCHEDULES, ScheduleContext, find_schedule

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


def test_an_unknown_kind_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"schedule.kind=shiffted: .* Did you mean shifted\?"):
        find_schedule(ScheduleConfig("shiffted"))
