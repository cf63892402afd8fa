"""`parallel.cp_exchange=auto` chooses by the exact share of a gather's bytes that blocks move."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import LayoutConfig, ModelConfig, ParallelConfig, PatternConfig, PretrainConfig, TrainConfig
from s2train.costs.exchange import AUTO_LIMIT, exchange_mode, exchanged_share, layer_exchanges
from s2train.environment.hardware import Hardware, gpu_rates
from s2train.errors import ConfigError
from s2train.layouts.counting import touched_key_blocks
from s2train.layouts.patterns import Dense, Pattern
from s2train.megatron.context_parallel.exchange_plan import exchanged_blocks, gathered_blocks
from s2train.planning import check, format_plan
from tests.layouts.layout_cases import make_hybrid, patterns, union_of

H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576, gpu_rates("NVIDIA H100 80GB HBM3"))
AUTO = ParallelConfig(cp=2, cp_exchange="auto")
LENGTH = 4096


@given(st.lists(patterns, min_size=1, max_size=3), st.integers(1, 40), st.integers(0, 39), st.integers(1, 40))
def test_touched_key_blocks_are_those_of_the_masks(
    heads: list[Pattern], num_blocks: int, first: int, count: int
) -> None:
    first, stop = min(first, num_blocks - 1), min(first + count, num_blocks)
    expected = union_of(heads, num_blocks)[first:stop].any(0)
    assert touched_key_blocks(heads, num_blocks, first, stop).equal(expected)


@given(st.lists(patterns, min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]), st.integers(2, 4), st.integers(1, 5))
def test_the_share_is_that_of_the_blocks_that_ranks_exchange(
    heads: list[Pattern], groups: int, cp: int, blocks: int
) -> None:
    layer = LayerLayout(LETTERS["S"], tuple(heads), 16)
    length = 2 * cp * blocks * 16
    layout = layer.block_layout(length)
    moved, all_blocks = (count(layout, groups, cp).sum().item() for count in (exchanged_blocks, gathered_blocks))
    assert exchanged_share(layer, groups, length, cp) == pytest.approx(moved / all_blocks, rel=1e-12)


def layer(stride: int) -> LayerLayout:
    """Four heads of two groups; a smaller stride keeps more columns."""
    return make_hybrid("S", num_layers=1, num_heads=4, num_query_groups=2, local=1, stride=stride).layers[0]


def test_auto_takes_blocks_up_to_the_limit_and_gathers_above() -> None:
    modes = {}
    for stride in (2, 3, 4, 6, 8, 16):
        share = exchanged_share(layer(stride), 2, LENGTH, 2)
        modes[stride] = exchange_mode(layer(stride), 2, LENGTH, AUTO)
        assert modes[stride] == ("blocks" if share <= AUTO_LIMIT else "gather")
    assert set(modes.values()) == {"blocks", "gather"}


@pytest.mark.parametrize("mode", ["blocks", "overlapped", "gather"])
def test_a_mode_that_is_set_stays(mode: str) -> None:
    for stride in (2, 16):
        assert exchange_mode(layer(stride), 2, LENGTH, replace(AUTO, cp_exchange=mode)) == mode


def test_dense_layers_always_gather() -> None:
    dense = LayerLayout(LETTERS["D"], (Dense(),) * 4, 16)
    assert exchange_mode(dense, 2, LENGTH, AUTO) == "gather"
    assert layer_exchanges([dense], 2, LENGTH, AUTO) == ()


def config(stride: int, **parallel: int | str) -> PretrainConfig:
    pattern = PatternConfig(local=1, stride=stride)
    return PretrainConfig(
        model=ModelConfig("small", 4, 256, 512, 4, 2, vocab_size=512),
        layout=LayoutConfig("DSSS", 64, pattern, allow_partial_coverage=True),
        parallel=ParallelConfig(**parallel),  # type: ignore[arg-type]
        train=TrainConfig(steps=1000, seq_length=LENGTH, global_batch_size=4),
    )


@pytest.mark.parametrize(("stride", "chosen"), [(2, "gather"), (16, "blocks")])
def test_the_plan_shows_the_choice_with_its_figure(stride: int, chosen: str) -> None:
    plan = check(config(stride, cp=4, cp_exchange="auto"), 4, H100)
    (found,) = plan.exchanges
    text = f"cp exchange   S: {chosen}; blocks are {found.share:.1%} of a gather's bytes; auto takes blocks up to 28%"
    assert text in format_plan(plan)


def test_the_plan_of_one_context_parallel_rank_shows_no_exchange() -> None:
    assert "cp exchange" not in format_plan(check(config(2, cp=1, cp_exchange="auto"), 4, H100))


def test_the_predicted_time_of_auto_is_that_of_its_choice() -> None:
    def seconds(stride: int, mode: str) -> float:
        found = check(config(stride, cp=2, cp_exchange=mode), 2, H100).prediction
        assert found is not None
        return found.time.total

    assert seconds(2, "gather") != seconds(2, "blocks")
    assert seconds(2, "auto") == seconds(2, "gather")
    assert seconds(16, "auto") == seconds(16, "blocks")


def test_another_exchange_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.cp_exchange=ring.*blocks, overlapped, gather, auto"):
        check(config(2, cp=2, cp_exchange="ring"), 2, H100)
    with pytest.raises(ConfigError, match=r"parallel\.cp_exchange=AUTO.*Did you mean parallel\.cp_exchange=auto\?"):
        check(config(2, cp=2, cp_exchange="AUTO"), 2, H100)
