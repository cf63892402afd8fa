"""Settings of the Hopper backward: which calls get which."""

import pytest
import torch
from s2train.kernels import BlockLayout, TopKLayout
from s2train.kernels.check.cases import CASES, case_names
from s2train.kernels.hopper.backward_config import HopperBackwardConfig, check_config, chosen_config, config_of
from s2train.kernels.hopper.backward_schedule import ScheduleOptions
from s2train.kernels.spec import AttentionSpec
from s2train.kernels.topk_layout import Layout
from torch import Tensor

K = 1024


def spec(documents: Tensor | None = None) -> AttentionSpec:
    return AttentionSpec(1.0, True, 0, documents, "sbhd")


def static(block: int, heads: int = 32) -> BlockLayout:
    return BlockLayout.from_mask(torch.ones(heads, 1, 1) > 0, block)


def chosen(block: int, dim: int = 128, kv_heads: int = 8, length: int = 32 * K) -> HopperBackwardConfig:
    return chosen_config(static(block), dim, kv_heads, length, spec())


def options_of_cases(words: str) -> list[ScheduleOptions]:
    """What the cases of `s2train.kernels.check` get whose names contain these words."""
    cases = [CASES[name] for name in case_names(False, [words])]
    assert cases
    return [chosen_config(static(x.block, x.heads), x.dim, x.kv_heads, x.s_q, spec()).schedule for x in cases]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_lists_made_at_run_time_get_plain_settings(block: int, dim: int) -> None:
    layout = TopKLayout.from_indices(torch.zeros(1, 8, 1, 1, dtype=torch.int32), block, num_heads=32)
    assert chosen_config(layout, dim, 8, 128 * K, spec()) == config_of(dim)


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_step_has_128_queries_at_dimension_64_in_large_blocks(block: int, dim: int) -> None:
    config = chosen(block, dim)
    larger = dim == 64 and block >= 128
    assert config.schedule.query_tile == (128 if larger else 64)
    assert config.stages == (2 if larger else config_of(dim).stages)
    assert {x.query_tile for x in options_of_cases("128 queries")} == {128}


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
def test_packed_documents_get_plain_settings(block: int, dim: int) -> None:
    assert chosen_config(static(block), dim, 8, 128 * K, spec(torch.tensor([0, 128 * K]))) == config_of(dim)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
@pytest.mark.parametrize("block", [64, 128])
def test_key_tiles_have_second_partners_in_blocks_of_64_with_grouped_heads(
    block: int, kv_heads: int, dim: int
) -> None:  # fmt: skip
    assert chosen(block, dim, kv_heads).schedule.second_pairs == (block == 64 and kv_heads < 32)
    assert all(x.second_pairs for x in options_of_cases("second pairs"))


@pytest.mark.parametrize("kv_heads", [8, 32])
@pytest.mark.parametrize("block", [128, 256])
def test_where_no_choice_helps_settings_are_plain(block: int, kv_heads: int) -> None:
    """So that these calls run the programs that they ran before there were choices."""
    assert chosen(block, kv_heads=kv_heads) == config_of(128)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("kv_heads", "length", "by_head"),
    [(8, 32 * K, False), (8, 64 * K, False), (8, 64 * K + 1, True), (8, 128 * K, True), (1, 32 * K, True),
     (32, 1024 * K, False)],
)  # fmt: skip
def test_programs_are_ordered_by_query_head_where_a_groups_queries_exceed_the_cache(
    kv_heads: int, length: int, by_head: bool, block: int, dim: int
) -> None:
    assert chosen(block, dim, kv_heads, length).schedule.by_query_head == by_head
    assert all(x.by_query_head for x in options_of_cases("by query head"))


@pytest.mark.parametrize(
    ("layout", "dim", "documents", "options"),
    [
        (static(128), 128, None, ScheduleOptions(query_tile=128)),
        (static(64), 64, None, ScheduleOptions(query_tile=128)),
        (static(128), 64, torch.tensor([0, 100]), ScheduleOptions(by_query_head=True)),
        (TopKLayout.from_indices(torch.zeros(1, 2, 1, 1, dtype=torch.int32), 64, num_heads=2), 64, None,
         ScheduleOptions(second_pairs=True)),
    ],
    ids=["128 queries, d 128", "128 queries, blocks of 64", "packed documents", "top-k lists"],
)  # fmt: skip
def test_explicit_settings_that_a_call_does_not_support_are_rejected(
    layout: Layout, dim: int, documents: Tensor | None, options: ScheduleOptions
) -> None:
    config = HopperBackwardConfig(2, schedule=options)
    with pytest.raises(ValueError, match=r"query_tile=128.* takes head dimension 64|no packed documents"):
        check_config(config, layout, dim, spec(documents))


def test_explicit_settings_that_a_call_supports_pass() -> None:
    check_config(config_of(64, ScheduleOptions(query_tile=128, by_query_head=True)), static(128), 64, spec())
    check_config(config_of(128), static(64), 128, spec(torch.tensor([0, 100])))
