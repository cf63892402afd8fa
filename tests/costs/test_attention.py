import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.costs.attention import attention_flops, density, kept_positions, layout_nbytes
from s2train.layouts.counting import kept_key_blocks
from s2train.layouts.patterns import Dilated, LocalVertical, Pattern
from tests.layouts.layout_cases import make_hybrid, mask_of, patterns


def count_tokens(pattern: Pattern, block_size: int, seq_length: int) -> int:
    """Kept causal (query, key) tokens, from a token mask."""
    num_blocks = -(-seq_length // block_size)
    of_blocks = mask_of(pattern, num_blocks)
    of_tokens = of_blocks.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return int(of_tokens[:seq_length, :seq_length].tril().sum())


@given(st.lists(patterns, min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 70))
def test_kept_positions_equal_the_token_masks_of_each_head(
    heads: list[Pattern], block_size: int, seq_length: int
) -> None:
    layer = LayerLayout(LETTERS["S"], tuple(heads), block_size)
    assert kept_positions(layer, seq_length) == tuple(count_tokens(head, block_size, seq_length) for head in heads)


def test_a_dense_layer_keeps_every_causal_position() -> None:
    layer = make_hybrid("D", num_layers=1, num_heads=3).layers[0]
    assert kept_positions(layer, 131_071) == (131_071 * 131_072 // 2,) * 3
    assert density(layer, 131_071) == 1


def test_the_density_of_a_model_is_the_mean_of_its_layers() -> None:
    hybrid = make_hybrid("DSS", num_layers=3, num_heads=4, stride=16)
    sparse = density(hybrid.layers[1], 1000)
    assert 0 < sparse < 1
    assert density(hybrid, 1000) == pytest.approx((1 + 2 * sparse) / 3)


def test_flops_are_four_times_the_head_dim_per_kept_position() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=4).layers[0]
    assert attention_flops(layer, 300, 32) == 4 * 32 * sum(kept_positions(layer, 300))


def test_densities_of_the_measured_layouts() -> None:
    # Block 128, window 8, stride 16, 32 heads: 0.269 at 8k tokens, 0.117 at 32k, 0.076 at 128k.
    hybrid = make_hybrid("S", num_layers=1, num_heads=32, local=8, stride=16, block_size=128)
    lengths = (8192, 32768, 131072)
    assert [round(density(hybrid, length), 3) for length in lengths] == [0.269, 0.117, 0.076]


@pytest.mark.parametrize("layers", ["S", "D"])
@pytest.mark.parametrize("seq_length", [1, 100, 1000])
def test_layout_nbytes_is_what_the_block_layout_takes(layers: str, seq_length: int) -> None:
    layer = make_hybrid(layers, num_layers=1, num_heads=12, stride=8).layers[0]
    assert layout_nbytes(layer, seq_length) == layer.block_layout(seq_length).nbytes


def test_heads_of_equal_pattern_share_their_index_tensors() -> None:
    few, many = (make_hybrid("S", num_layers=1, num_heads=num_heads, stride=4).layers[0] for num_heads in (4, 64))
    extra = layout_nbytes(many, 4096) - layout_nbytes(few, 4096)
    assert extra < layout_nbytes(few, 4096) / 10


def test_patterns_without_columns_are_counted_where_their_masks_come_in_chunks() -> None:
    num_blocks = 2500  # more than a chunk of whole rows
    layer = LayerLayout(LETTERS["S"], (Dilated(1, 7, 0),), 1)
    assert kept_positions(layer, num_blocks) == (sum(i // 7 + 1 for i in range(num_blocks)),)
    both = kept_key_blocks([Dilated(1, 2, 0), LocalVertical(1, 2, 0)], num_blocks)
    # Odd keys of even queries: an odd way apart, and no column.
    assert both.tolist() == [i + 1 - (0 if i % 2 else i // 2) for i in range(num_blocks)]
