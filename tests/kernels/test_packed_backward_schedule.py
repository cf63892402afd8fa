"""The schedule of Hopper's one-pass backward over packed documents, spelled out per token."""

import random
import weakref

import pytest
import torch
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.hopper.backward_schedule import ACTIVE_BITS, QUERY_BITS, TILE
from s2train.kernels.hopper.packed_backward_schedule import packed_backward_schedule
from s2train.kernels.token_mask import token_mask

LENGTHS = [(37, 0, 200, 1, 130), (0, 0, 5), (256,), (64, 128, 192, 0), (1, 1, 1), (63, 65, 127, 129)]


def bounds_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("block", "heads", "kv_heads"), [(64, 4, 2), (64, 2, 2), (128, 3, 1), (256, 1, 1)])
@pytest.mark.parametrize("keep", [0.5, 0.05])
def test_steps_cover_every_documents_mask_once(
    lengths: tuple[int, ...], block: int, heads: int, kv_heads: int, keep: float
) -> None:
    blocks = 512 // block
    layout = BlockLayout.from_mask(torch.rand(heads, blocks, blocks) < keep, block)
    total = sum(lengths)
    schedule = packed_backward_schedule(layout, kv_heads, bounds_of(lengths), total)
    assert schedule.tiles is not None
    room = total + 3 * TILE  # tiles' ends lie beyond
    covered = torch.zeros(heads, room, room, dtype=torch.int)
    expected = torch.zeros_like(covered)
    start = 0
    for length in lengths:
        end = start + length
        if length:
            expected[:, start:end, start:end] = token_mask(layout, length, length, causal=True, query_offset=0).int()
        start = end
    owned = []
    for kv, *key_tiles, first, num_masked, num_steps, skip, first_tile, start, length in schedule.meta.tolist():
        assert num_steps >= 1
        owned += [(kv, start, key) for key in key_tiles if key * TILE < length]
        for t in range(num_steps):
            step = int(schedule.steps[first + t + (skip if t >= num_masked else 0)])
            tile = step >> ACTIVE_BITS & (2**QUERY_BITS - 1)
            head = kv * (heads // kv_heads) + (step >> (ACTIVE_BITS + QUERY_BITS))
            if length:
                assert schedule.tiles[first_tile + tile].tolist() == [start, length, tile]
            position = tile * TILE + torch.arange(TILE)[:, None]
            for side, key_tile in enumerate(key_tiles):
                key = key_tile * TILE + torch.arange(TILE)
                kept = (position < length) & (key < room)  # the log-sum-exps of other rows are +inf
                if t < num_masked:
                    kept = kept & bool(step >> side & 1) & (key <= position)
                rows, keys = start + position.expand_as(kept)[kept], start + key.expand_as(kept)[kept]
                covered[head].index_put_((rows, keys), torch.ones(len(rows), dtype=torch.int), accumulate=True)
    assert torch.equal(covered, expected)
    every = [(kv, int(s), int(t)) for kv in range(kv_heads) for s, n, t in schedule.tiles.tolist() if t * TILE < n]
    assert sorted(owned) == sorted(every)  # each key tile of each document is written by one program


def test_sizes_depend_on_the_shapes_alone() -> None:
    layout = BlockLayout.from_mask(torch.rand(2, 8, 8) < 0.5, 64)
    cuts = sorted(random.sample(range(500), 3))
    a = packed_backward_schedule(layout, 2, torch.tensor([0, *cuts, 500], dtype=torch.int32), 500)
    b = packed_backward_schedule(layout, 2, torch.tensor([0, 0, 0, 0, 500], dtype=torch.int32), 500)
    assert a.meta.shape == b.meta.shape
    assert a.num_tiles == b.num_tiles


def test_changed_bounds_are_noticed() -> None:
    layout = BlockLayout.from_mask(torch.rand(2, 8, 8) < 0.5, 64)
    bounds = bounds_of((100, 100))
    first = packed_backward_schedule(layout, 2, bounds, 200)
    assert packed_backward_schedule(layout, 2, bounds, 200) is first
    bounds[1] = 30
    assert int(packed_backward_schedule(layout, 2, bounds, 200).meta[:, 9].max()) == 170
    assert int(packed_backward_schedule(layout, 2, bounds_of((200, 0)), 200).meta[:, 9].max()) == 200


def test_the_bounds_of_both_chunks_of_a_context_parallel_rank_are_kept() -> None:
    layout = BlockLayout.from_mask(torch.rand(2, 8, 8) < 0.5, 64)
    chunks = bounds_of((100, 100)), bounds_of((37, 163))
    first = [packed_backward_schedule(layout, 2, bounds, 200) for bounds in chunks]
    again = [packed_backward_schedule(layout, 2, bounds, 200) for bounds in chunks]
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_few_documents_are_kept_however_many_lengths_they_have(device: torch.device) -> None:
    layout = BlockLayout.from_mask(torch.ones(1, 1, 1, dtype=torch.bool, device=device), 64)
    known = []
    for length in range(20, 44):  # as a context parallel rank's chunks, from where the first document begins
        bounds = bounds_of((length,)).to(device)
        known.append(weakref.ref(bounds))
        q, k, v = (torch.randn(length, 1, 1, 16, device=device, requires_grad=True) for _ in range(3))
        block_sparse_attention(q, k, v, layout, cu_seqlens=bounds, backend="portable").sum().backward()
        packed_backward_schedule(layout, 1, bounds, length)
    del bounds
    assert 1 <= sum(one() is not None for one in known) <= 16
