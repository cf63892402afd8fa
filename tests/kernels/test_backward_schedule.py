"""The schedule of Hopper's one-pass backward, spelled out per token."""

from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.hopper import backward_schedule as module
from s2train.kernels.hopper import pair_parts, shared_tiles
from s2train.kernels.hopper.backward_schedule import (
    ACTIVE_BITS,
    PLAIN,
    QUERY_BITS,
    TILE,
    ScheduleOptions,
    backward_schedule,
)
from s2train.kernels.hopper.kept_tiles import KeptTiles
from s2train.kernels.hopper.pair_parts import PairParts
from s2train.kernels.hopper.shared_tiles import SharedTiles
from s2train.kernels.token_mask import token_mask


@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "s_q", "s_k", "offset", "causal", "keep", "options"),
    [
        (64, 2, 1, 200, 200, 0, True, 0.4, PLAIN),
        (128, 2, 2, 300, 300, 0, True, 0.4, PLAIN),
        (64, 2, 2, 100, 230, 150, True, 0.4, PLAIN),
        (128, 2, 1, 130, 150, 0, False, 0.4, PLAIN),
        (256, 1, 1, 300, 300, 0, True, 0.9, PLAIN),
        (64, 2, 1, 200, 90, 0, True, 0.05, PLAIN),
        (128, 2, 1, 300, 300, 70, True, 0.4, ScheduleOptions(query_tile=128)),
        (128, 4, 2, 300, 400, 70, True, 0.4, ScheduleOptions(query_tile=128, by_query_head=True)),
        (64, 4, 2, 900, 850, 70, True, 0.5, ScheduleOptions(second_pairs=True)),
        (64, 4, 2, 800, 900, 200, True, 0.6, ScheduleOptions(second_pairs=True, by_query_head=True)),
    ],
)
def test_steps_cover_the_mask_once(
    block: int, heads: int, kv_heads: int, s_q: int, s_k: int, offset: int, causal: bool, keep: float,
    options: ScheduleOptions, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(shared_tiles, "_LEAST_STEPS", 1)
    blocks = -(-(offset + s_q) // block), -(-s_k // block)
    layout = BlockLayout.from_mask(torch.rand(heads, *blocks) < keep, block)
    schedule = backward_schedule(layout, kv_heads, s_q, s_k, offset, causal, options=options)
    assert isinstance(schedule.parts, SharedTiles) == options.second_pairs
    # room for the tiles' ends beyond the sequences
    covered = torch.zeros(heads, offset + s_q + TILE, s_k + 3 * TILE, dtype=torch.int)
    position, key = torch.arange(covered.shape[1])[:, None], torch.arange(covered.shape[2])
    owned = set()
    for kv, first_key, second_key, first, num_masked, num_steps, _, _ in schedule.meta.tolist():
        assert num_steps >= 1
        for side, key_tile in enumerate((first_key, second_key)):
            owned.add((kv, key_tile))
            for t in range(num_steps):
                step = int(schedule.steps[first + t])
                tile = step >> ACTIVE_BITS & (2**QUERY_BITS - 1)
                head = kv * (heads // kv_heads) + (step >> (ACTIVE_BITS + QUERY_BITS))
                kept = (position // options.query_tile == tile) & (key // TILE == key_tile)
                if t < num_masked:
                    kept &= bool(step >> side & 1) & (key < s_k) & ((key <= position) | (not causal))
                covered[head] += kept
    assert {(kv, tile) for kv, tile in owned if tile * TILE < s_k} == {
        (kv, tile) for kv in range(kv_heads) for tile in range(-(-s_k // TILE))
    }
    expected = token_mask(layout, s_q, s_k, causal=causal, query_offset=offset).int()
    assert torch.equal(covered[:, offset : offset + s_q, :s_k], expected)
    assert not covered[:, :, s_k:].any()


def local_and_vertical(heads: int, kv_heads: int, shifted: bool, length: int) -> BlockLayout:
    """L = V = 16 blocks of 64; head h has offset h mod 16, or every head of a group the group's."""
    block = torch.arange(length // TILE)
    distance = block[:, None] - block
    patterns = torch.stack([((distance < 16) | ((block + 1 + h) % 16 == 0)) & (distance >= 0) for h in range(16)])
    group = heads // kv_heads
    return BlockLayout.from_patterns(patterns, [(h if shifted else h // group) % 16 for h in range(heads)], TILE)


# ideal: every step has both key tiles active. A pair's two local windows, apart or neighbours, never quite match.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "shifted", "over_ideal"),
    [(16, 16, True, 1.10), (16, 4, False, 1.10), (16, 4, True, 1.25)],
    ids=["one head each", "groups of like heads", "groups of unlike heads"],
)
def test_pairs_keep_what_alike_members_keep(heads: int, kv_heads: int, shifted: bool, over_ideal: float) -> None:
    length = 8192
    layout = local_and_vertical(heads, kv_heads, shifted, length)
    schedule = backward_schedule(layout, kv_heads, length, length, 0, True)
    assert int(schedule.meta[:, 5].sum()) <= over_ideal * int(layout.mask().sum()) / 2


def test_second_partners_leave_few_steps_with_one_tile() -> None:
    length = 8192
    layout = local_and_vertical(16, 4, True, length)
    sizes = (4, length, length, 0, True)
    schedule = backward_schedule(layout, *sizes, options=ScheduleOptions(second_pairs=True))
    steps = int(schedule.meta[:, 5].sum())
    assert steps <= 0.94 * int(backward_schedule(layout, *sizes).meta[:, 5].sum())
    assert steps <= 1.12 * int(layout.mask().sum()) / 2
    # both programs of a tile that has two store sums, and each tile is stored once
    assert isinstance(schedule.parts, SharedTiles)
    places = schedule.parts.sums[:, :2].flatten()
    assert places[places >= 0].sort().values.tolist() == list(range(2 * schedule.parts.num_slots))
    with_slot = schedule.parts.slots >= 0
    stored = schedule.meta[~with_slot][:, [0, 1, 0, 2]].reshape(-1, 2).tolist()
    added = torch.stack([schedule.parts.sums[:, 2], schedule.parts.sums[:, 4] // TILE], 1).tolist()
    assert sorted(stored + added) == [[kv, tile] for kv in range(4) for tile in range(length // TILE)]


@pytest.mark.parametrize(
    ("heads", "s_q", "s_k"), [(2, 4096, 4096), (4, 4096, 4096), (4, 1024, 4096), (4, 250, 4096), (3, 1000, 4000)]
)
def test_slots_of_second_pairs_take_no_more_memory_than_the_accumulator(heads: int, s_q: int, s_k: int) -> None:
    mask = torch.rand(heads, 64, 64) < 0.5
    schedule = backward_schedule(
        BlockLayout.from_mask(mask, TILE), 1, s_q, s_k, 0, False, options=ScheduleOptions(second_pairs=True)
    )
    if schedule.parts is not None:
        assert schedule.parts.num_slots * 1024 <= 4 * heads * schedule.num_tiles * TILE


@pytest.mark.parametrize(("multiprocessors", "is_cut"), [(8, False), (132, True)])
def test_pairs_that_are_cut_have_no_second_partners(
    multiprocessors: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_parts, "multiprocessors", lambda device: multiprocessors)
    length, options = 8192, ScheduleOptions(second_pairs=True)
    layout = local_and_vertical(16, 4, True, length)
    plain, second, whole = (
        backward_schedule(layout, 4, length, length, 0, True, copies, x)
        for copies, x in ((1, PLAIN), (1, options), (0, options))
    )
    assert isinstance(whole.parts, SharedTiles)
    expected = plain if is_cut else whole
    assert isinstance(second.parts, PairParts) == is_cut
    assert second.meta.equal(expected.meta)


def test_pairs_of_too_few_queries_to_be_cut_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built, kept_tiles = [], module.kept_tiles_of_group

    def counted(layout: BlockLayout, group: tuple[int, ...], *limits: Any) -> KeptTiles:
        built.append(group)
        return kept_tiles(layout, group, *limits)

    monkeypatch.setattr(module, "kept_tiles_of_group", counted)
    layout = local_and_vertical(8, 4, False, 8192)
    s_q = 64 * TILE  # of two members: a pair has 128 steps at most
    backward_schedule(layout, 4, s_q, 8192, 8192 - s_q, True, 1, ScheduleOptions(second_pairs=True))
    assert len(built) == 4


def test_ordering_by_query_head_changes_only_the_order() -> None:
    length = 8192
    layout = local_and_vertical(16, 4, True, length)
    plain, ordered = (
        backward_schedule(layout, 4, length, length, 0, True, options=ScheduleOptions(by_query_head=x))
        for x in (False, True)
    )
    assert ordered.steps.equal(plain.steps)
    assert not ordered.meta.equal(plain.meta)
    assert ordered.meta.unique(dim=0).equal(plain.meta.unique(dim=0))


def test_masks_without_an_order_cost_no_more_than_neighbours_as_they_lie() -> None:
    n = 64
    mask = (torch.rand(4, n, n) < 0.2).tril()
    steps = int(backward_schedule(BlockLayout.from_mask(mask, TILE), 1, n * TILE, n * TILE, 0, True).meta[:, 5].sum())
    either = mask.view(4, n, n // 2, 2).any(-1)
    assert steps <= int(either.sum()) + int((either.sum((0, 1)) == 0).sum())
