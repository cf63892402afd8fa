"""Which pages a layout needs at every length, against the definition spelled out."""

import random

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.decode.pages import last_uses, most_pages_held, pages_held, read_tokens, write_tokens

BLOCK = 16


def random_mask(heads: int, num_blocks: int) -> torch.Tensor:
    return torch.rand(heads, num_blocks, num_blocks) < random.choice([0.0, 0.1, 0.5, 0.9])


def needed(mask: torch.Tensor, kv_heads: int, kv: int, key: int, from_query: int) -> bool:
    """Does any head of the group keep the key block for a query block at or after `from_query`, and after the key?"""
    group = mask.shape[0] // kv_heads
    heads = mask[kv * group : (kv + 1) * group]
    return bool(heads[:, max(from_query, key) :, key].any())


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1)])
def test_a_block_is_held_until_no_head_of_its_group_needs_it(heads: int, kv_heads: int) -> None:
    num_blocks = 6
    mask = random_mask(heads, num_blocks)
    last_use = last_uses(BlockLayout.from_mask(mask, BLOCK), kv_heads)
    most = [0] * kv_heads
    for length in range(num_blocks * BLOCK + 1):
        blocks, query = -(-length // BLOCK), length // BLOCK
        held = [sum(needed(mask, kv_heads, kv, key, query) for key in range(blocks)) for kv in range(kv_heads)]
        assert pages_held(last_use, length, BLOCK) == sum(held)
        if length < num_blocks * BLOCK:
            held_writing = [
                sum(needed(mask, kv_heads, kv, key, query) for key in range(query + 1)) for kv in range(kv_heads)
            ]
            most = [max(a, b) for a, b in zip(most, held_writing, strict=True)]
    assert most_pages_held(last_use) == sum(most)


def test_tokens_come_back_from_their_pages_and_holes_are_zero() -> None:
    table = torch.tensor([[[2, -1, 0], [1, 3, -1]]], dtype=torch.int32)
    pages = torch.full((5, BLOCK, 4), torch.nan)
    tokens = torch.randn(1, 2, 2 * BLOCK + 5, 4)
    write_tokens(pages, table, tokens[:, :, :9], 0)
    write_tokens(pages, table, tokens[:, :, 9:], 9)
    expected = tokens.clone()
    expected[0, 0, BLOCK : 2 * BLOCK] = 0
    expected[0, 1, 2 * BLOCK :] = 0
    assert torch.equal(read_tokens(pages, table, 2 * BLOCK + 5), expected)
