import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2train.errors import ConfigError
from s2train.layouts.patterns import ColumnPattern, Dense, LocalVertical, Pattern
from tests.layouts.layout_cases import column_patterns, local_verticals, mask_of, patterns


@given(local_verticals, st.integers(1, 40))
def test_local_vertical_keeps_window_columns_and_sinks_and_nothing_else(
    pattern: LocalVertical, num_blocks: int
) -> None:
    mask = mask_of(pattern, num_blocks)
    for i in range(num_blocks):
        for j in range(num_blocks):
            far = (j - pattern.offset) % pattern.stride == 0 or j < pattern.sinks
            assert mask[i, j].item() == (i >= j and (i - j < pattern.local or far))


def test_dense_keeps_the_lower_triangle() -> None:
    assert torch.equal(mask_of(Dense(), 9), torch.ones(9, 9, dtype=torch.bool).tril())


@given(patterns, st.integers(1, 40))
def test_every_pattern_is_causal_and_keeps_the_diagonal(pattern: Pattern, num_blocks: int) -> None:
    mask = mask_of(pattern, num_blocks)
    assert mask.diagonal().all()
    assert not mask.triu(1).any()


@given(column_patterns)
def test_a_column_pattern_is_its_window_and_its_columns(pattern: ColumnPattern) -> None:
    key = torch.arange(30)
    distance = key[:, None] - key[None, :]
    expected = (distance >= 0) & ((distance < pattern.local) | pattern.columns(key))
    assert torch.equal(mask_of(pattern, 30), expected)


@given(local_verticals)
def test_a_key_block_once_dropped_is_never_taken_up_again(pattern: LocalVertical) -> None:
    mask = mask_of(pattern, 40)
    for j in range(40):
        kept = mask[j:, j].int()
        assert (kept.diff() <= 0).all()


def test_keep_broadcasts_and_is_bool() -> None:
    query, key = torch.arange(6).view(2, 3, 1), torch.arange(5)
    kept = LocalVertical(local=1, stride=3, offset=1).keep(query, key)
    assert kept.shape == (2, 3, 5)
    assert kept.dtype == torch.bool


def test_offsets_count_modulo_the_stride() -> None:
    assert LocalVertical(2, 8, -1) == LocalVertical(2, 8, 7)
    assert len({LocalVertical(2, 8, 3), LocalVertical(2, 8, 11)}) == 1


@pytest.mark.parametrize(
    ("setting", "local", "stride", "sinks"),
    [("local", 0, 4, 0), ("stride", 2, 0, 0), ("sinks", 2, 4, -1)],
)
def test_a_pattern_that_cannot_be_is_refused_by_its_setting(setting: str, local: int, stride: int, sinks: int) -> None:
    with pytest.raises(ConfigError, match=f"^layout.pattern.{setting}="):
        LocalVertical(local, stride, 0, sinks)


def test_descriptions_tell_patterns_apart() -> None:
    some: list[Pattern] = [
        Dense(),
        LocalVertical(2, 4, 0),
        LocalVertical(2, 4, 1),
        LocalVertical(2, 4, 1, sinks=1),
    ]
    assert len({pattern.describe() for pattern in some}) == len(some)
