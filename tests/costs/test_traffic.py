from hypothesis import given, settings
from hypothesis import strategies as st

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.costs.traffic import attention_traffic
from s2train.layouts.patterns import Pattern
from tests.layouts.layout_cases import make_hybrid, mask_of, patterns


def loaded(pattern: Pattern, num_blocks: int, block_size: int) -> tuple[int, int]:
    """Keys that 128-query tiles load and queries that 128-key tiles load, walked tile by tile in 64-token units."""
    unit = min(block_size, 64)
    mask = mask_of(pattern, num_blocks)
    tiles = mask.repeat_interleave(block_size // unit, 0).repeat_interleave(block_size // unit, 1)
    tiles = tiles.tril()
    held = tiles.view(len(tiles), -1, 2).any(-1) if block_size >= 128 else tiles  # keys of a backward program
    queries = int(held.sum()) * unit
    merged = 1 if unit < 64 else 2
    keys = 0
    for rows in tiles.split(merged):
        seen = rows.any(0)
        if block_size >= 128:  # keys come 128 at a time
            seen = seen.view(-1, 2).any(1).repeat_interleave(2)
        keys += int(seen.sum()) * unit
    return keys, queries


@settings(deadline=None)
@given(
    st.lists(patterns, min_size=1, max_size=2),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.integers(1, 19),
    st.sampled_from([64, 128]),
)
def test_the_kernels_load_what_their_tiles_keep(
    pair: list[Pattern], block_size: int, num_blocks: int, head_dim: int
) -> None:
    layer = LayerLayout(LETTERS["S"], (*pair, *pair), block_size)
    seq_length = num_blocks * block_size
    moved = attention_traffic(layer, 2, seq_length, head_dim)
    keys = queries = 0
    for head in layer.heads:
        of_head = loaded(head, num_blocks, block_size)
        keys, queries = keys + of_head[0], queries + of_head[1]
    row = 2 * head_dim  # bytes in bf16
    rows = len(layer.heads) * seq_length
    assert moved.forward == 2 * rows * row + 4 * rows + 2 * keys * row
    prepare = 2 * rows * row + 4 * rows + 4 * rows * head_dim  # out, dout; delta; cleared sums
    steps = queries * (2 * row + 8 + 8 * head_dim)  # q, dout; log-sum-exps, deltas; dq read and written
    kv = 4 * 2 * seq_length * row  # k, v, dk, dv of two KV heads
    finish = rows * (4 * head_dim + row)
    assert moved.backward == prepare + steps + kv + finish


def test_each_tensor_once_is_the_least() -> None:
    layer = make_hybrid("S", num_layers=1, num_heads=8, num_query_groups=2, block_size=128).layers[0]
    moved = attention_traffic(layer, 2, 1000, 128)
    query, key, rows = 8 * 1000 * 128 * 2, 2 * 1000 * 128 * 2, 8 * 1000 * 4
    assert moved.forward_least == 2 * query + 2 * key + rows
    assert moved.backward_least == 4 * query + 4 * key + rows


@given(st.lists(patterns, min_size=1, max_size=3), st.integers(1, 2500))
def test_streaming_never_moves_less_than_each_tensor_once(heads: list[Pattern], seq_length: int) -> None:
    moved = attention_traffic(LayerLayout(LETTERS["S"], tuple(heads), 64), len(heads), seq_length, 128)
    assert moved.forward_least <= moved.forward
    assert moved.backward_least <= moved.backward


@given(patterns, st.integers(1, 40))
def test_tiles_of_two_blocks_load_the_union_of_their_rows(pattern: Pattern, num_blocks: int) -> None:
    moved = attention_traffic(LayerLayout(LETTERS["S"], (pattern,), 64), 1, num_blocks * 64, 64)
    keys = sum(int(rows.any(0).sum()) for rows in mask_of(pattern, num_blocks).split(2)) * 64
    assert moved.forward == num_blocks * 64 * (2 * 128 + 4) + 2 * keys * 128
