import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.costs.kv_cache import CacheTokens, cache_tokens, model_cache_tokens
from s2train.layouts.patterns import Dilated, Pattern
from tests.layouts.layout_cases import make_hybrid, mask_of, patterns

groups_of_heads = st.integers(1, 3).flatmap(
    lambda size: st.lists(st.lists(patterns, min_size=size, max_size=size), min_size=1, max_size=3)
)


def simulate(groups: list[list[Pattern]], block_size: int, seq_length: int) -> list[int]:
    """Tokens held in all caches while each position is decoded, from what every later position keeps."""
    num_blocks = -(-seq_length // block_size)
    held = [0] * seq_length
    for group in groups:
        union = torch.stack([mask_of(head, num_blocks) for head in group]).any(0)
        tokens = union.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        tokens = tokens[:seq_length, :seq_length].tril()
        for now in range(seq_length):
            # Memory comes in blocks: a block is held as long as any of its tokens is wanted.
            wanted = (tokens[now:, : now + 1].any(0)).nonzero().flatten() // block_size
            held[now] += int(torch.isin(torch.arange(now + 1) // block_size, wanted).sum())
    return held


@settings(deadline=None)
@given(groups_of_heads, st.integers(1, 4), st.integers(1, 40))
def test_the_cache_holds_what_any_later_position_takes_up(
    groups: list[list[Pattern]], block_size: int, seq_length: int
) -> None:
    heads = tuple(head for group in groups for head in group)
    tokens = cache_tokens(LayerLayout(LETTERS["S"], heads, block_size), len(groups), seq_length)
    held = simulate(groups, block_size, seq_length)
    assert (tokens.peak, tokens.end, tokens.dense) == (max(held), held[-1], len(groups) * seq_length)
    assert tokens.read == tokens.end  # the last position has no later one


def test_a_dilated_head_holds_nearly_all_until_the_end() -> None:
    layer = LayerLayout(LETTERS["S"], (Dilated(1, 3, 0),), 16)
    tokens = cache_tokens(layer, 1, 40 * 16)
    assert tokens.peak > 36 * 16
    assert tokens.end == 14 * 16


def test_dense_layers_hold_all() -> None:
    hybrid = make_hybrid("D", num_layers=3, num_heads=4, num_query_groups=2)
    assert model_cache_tokens(hybrid, 1001) == CacheTokens(6 * 1001, 6 * 1001, 6 * 1001, 6 * 1001)


def test_a_model_holds_the_sum_of_its_layers() -> None:
    hybrid = make_hybrid("DSS", num_layers=6, num_heads=8, num_query_groups=2, stride=8, kind="rotating")
    layers = [cache_tokens(layer, 2, 777) for layer in hybrid.layers]
    assert model_cache_tokens(hybrid, 777).end == sum(layer.end for layer in layers)


@pytest.mark.parametrize("num_heads", [8, 32])
def test_heads_of_a_group_share_a_cache(num_heads: int) -> None:
    # One offset a group: as much as one head of it, though the group has many.
    hybrid = make_hybrid("S", num_layers=1, num_heads=num_heads, num_query_groups=8, kind="grouped", stride=8)
    assert model_cache_tokens(hybrid, 4096) == model_cache_tokens(
        make_hybrid("S", num_layers=1, num_heads=8, stride=8), 4096
    )


def test_a_cached_token_is_a_key_and_a_value() -> None:
    assert CacheTokens(1, 1, 1, 1).nbytes(1000, head_dim=128) == 2 * 128 * 2 * 1000
