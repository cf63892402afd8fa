"""The work lists of Hopper's one-pass backward, spelled out per token."""

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.key_pairs import ACTIVE_BITS, QUERY_BITS, TILE, key_pairs
from s2train.kernels.token_mask import token_mask


@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "s_q", "s_k", "offset", "causal", "keep"),
    [
        (64, 2, 1, 200, 200, 0, True, 0.4),
        (128, 2, 2, 300, 300, 0, True, 0.4),
        (64, 2, 2, 100, 230, 150, True, 0.4),
        (128, 2, 1, 130, 150, 0, False, 0.4),
        (256, 1, 1, 300, 300, 0, True, 0.9),
        (64, 2, 1, 200, 90, 0, True, 0.05),
    ],
)
def test_steps_cover_the_mask_once(
    block: int, heads: int, kv_heads: int, s_q: int, s_k: int, offset: int, causal: bool, keep: float
) -> None:
    blocks = -(-(offset + s_q) // block), -(-s_k // block)
    layout = BlockLayout.from_mask(torch.rand(heads, *blocks) < keep, block)
    work = key_pairs(layout, kv_heads, s_q, s_k, offset, causal)
    # room for the tiles' ends beyond the sequences
    covered = torch.zeros(heads, offset + s_q + TILE, s_k + 3 * TILE, dtype=torch.int)
    position, key = torch.arange(covered.shape[1])[:, None], torch.arange(covered.shape[2])
    owned = set()
    for kv, first_key, second_key, first, num_masked, num_steps, _, _ in work.meta.tolist():
        assert num_steps >= 1
        for side, key_tile in enumerate((first_key, second_key)):
            owned.add((kv, key_tile))
            for t in range(num_steps):
                step = int(work.steps[first + t])
                tile = step >> ACTIVE_BITS & (2**QUERY_BITS - 1)
                head = kv * (heads // kv_heads) + (step >> (ACTIVE_BITS + QUERY_BITS))
                kept = (position // TILE == tile) & (key // TILE == key_tile)
                if t < num_masked:
                    kept &= bool(step >> side & 1) & (key < s_k) & ((key <= position) | (not causal))
                covered[head] += kept
    assert {(kv, tile) for kv, tile in owned if tile * TILE < s_k} == {
        (kv, tile) for kv in range(kv_heads) for tile in range(-(-s_k // TILE))
    }
    expected = token_mask(layout, s_q, s_k, causal=causal, query_offset=offset).int()
    assert torch.equal(covered[:, offset : offset + s_q, :s_k], expected)
    assert not covered[:, :, s_k:].any()
