"""Hopper's schedules of top-k lists, built by interpreted kernels, equal those of the same static masks."""

import os

import pytest
import torch
from s2train.kernels import BlockLayout, TopKLayout
from s2train.kernels.check.run_time import random_indices
from s2train.kernels.hopper.backward_schedule import ACTIVE_BITS, QUERY_BITS, BackwardSchedule, backward_schedule
from s2train.kernels.hopper.forward_schedule import TILE, ForwardSchedule, forward_schedule
from s2train.kernels.hopper.topk_backward_schedule import in_order, topk_backward_schedule
from s2train.kernels.hopper.topk_forward_schedule import topk_forward_schedule
from s2train.kernels.interpreter import repair_interpreter

from tests.kernels.test_program_order import busy_until

repair_interpreter()
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")
N_Q, N_K = 3, 4


def both_layouts(block: int, heads: int, lists: int, batch: int, keep: float) -> tuple[TopKLayout, BlockLayout]:
    indices = random_indices(batch, lists, N_Q, N_K, keep)
    layout = TopKLayout.from_indices(indices, block, num_heads=heads, num_key_blocks=N_K)
    return layout, BlockLayout.from_mask(layout.mask(), block)


def steps_of_tiles(
    schedule: ForwardSchedule, batch: int, tiles: int
) -> dict[tuple[int, int, int], tuple[int, list[int]]]:
    """By sequence, head and tile: how many steps need a mask, and the chunks of all."""
    found = {}
    per_step = TILE // schedule.chunk_keys
    for b in range(batch):
        tables = (
            x.view(-1, x.shape[-1])[b if schedule.batched else 0].tolist()
            for x in (schedule.head_order, schedule.head_slot)
        )
        for head, slot in zip(*tables, strict=True):
            for tile in range(tiles):
                at = slot * schedule.tiles_per_pattern + tile
                begin, end = (
                    schedule.step_offsets[at] if schedule.batched else schedule.step_offsets[at : at + 2]
                ).tolist()
                chunks = schedule.chunks[begin * per_step : end * per_step].tolist()
                found[b, head, tile] = (int(schedule.full_offsets[at]) - begin, chunks)
    return found


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize(
    ("causal", "heads", "lists", "batch", "keep", "missing"),
    [(True, 2, 2, 2, 0.5, 0), (True, 4, 2, 1, 0.2, 70), (False, 2, 1, 1, 0.6, 70), (False, 1, 1, 2, 1.0, 0)],
)
def test_forward_steps_are_those_of_the_same_mask(
    block: int, causal: bool, heads: int, lists: int, batch: int, keep: float, missing: int
) -> None:
    layout, static = both_layouts(block, heads, lists, batch, keep)
    s_q, s_k = N_Q * block - missing // 2, N_K * block - missing
    tiles = -(-s_q // TILE)
    expected = forward_schedule(static, causal=causal, query_end=s_q, s_k=s_k)
    measured = topk_forward_schedule(layout, causal=causal, s_k=s_k)
    assert steps_of_tiles(measured, batch, tiles) == steps_of_tiles(expected, batch, tiles)


def pairs(schedule: BackwardSchedule) -> dict[tuple[int, int, int, int], tuple[int, int, list[int]]]:
    """By sequence, KV head and key tiles: steps that need a mask, the first step, all steps."""
    return {
        (row[7], *row[:3]): (row[4], row[6], schedule.steps[row[3] : row[3] + row[5]].tolist())
        for row in schedule.meta.tolist()
    }


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize(
    ("causal", "heads", "lists", "kv_heads", "batch", "keep", "offset"),
    [(True, 2, 2, 1, 2, 0.5, 0), (True, 4, 2, 2, 1, 0.2, 100), (False, 2, 2, 2, 1, 0.5, 0)],
)
def test_backward_steps_are_those_of_the_same_mask(
    block: int, causal: bool, heads: int, lists: int, kv_heads: int, batch: int, keep: float, offset: int
) -> None:
    layout, static = both_layouts(block, heads, lists, batch, keep)
    sizes = (kv_heads, N_Q * block - 37 - offset, N_K * block - 70, offset, causal)
    measured, expected = topk_backward_schedule(layout, *sizes), backward_schedule(static, *sizes)
    assert pairs(measured) == pairs(expected)
    assert (measured.first_tile, measured.num_tiles) == (expected.first_tile, expected.num_tiles)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lists", "batch"), [(4, 1), (2, 2)])
def test_backward_steps_of_blocks_of_64_cover_the_mask_once(causal: bool, lists: int, batch: int) -> None:
    block, heads, kv_heads = 64, 4, 2
    layout, _ = both_layouts(block, heads, lists, batch, 0.5)
    mask = layout.mask()
    if causal:
        mask &= torch.ones(N_Q, N_K, dtype=torch.bool).tril()
    schedule = topk_backward_schedule(layout, kv_heads, N_Q * block, N_K * block, 0, causal)
    seen = torch.zeros(batch, heads, N_Q, N_K, dtype=torch.int)
    for (b, kv, first, _), (num_masked, _, steps) in pairs(schedule).items():
        for t, step in enumerate(steps):
            head = kv * (heads // kv_heads) + (step >> (ACTIVE_BITS + QUERY_BITS))
            tile = step >> ACTIVE_BITS & (2**QUERY_BITS - 1)
            active = step & 3
            assert t < num_masked or active == 3
            for side in range(2):
                seen[b, head, tile, first + side] += active >> side & 1
    assert seen.equal(mask.int())


def test_long_programs_start_early_enough_to_end_with_the_others() -> None:
    n, k, kv_heads = 128, 8, 4
    scores = torch.rand(kv_heads, n, n).masked_fill(torch.ones(n, n).triu(1) > 0, -1)
    scores[..., 0] = 2  # all keep the first block
    mask = torch.zeros(kv_heads, n, n, dtype=torch.bool).scatter_(-1, scores.topk(k).indices, True).tril()
    static = BlockLayout.from_patterns(mask, [head // 8 for head in range(32)], 128)
    expected = backward_schedule(static, kv_heads, n * 128, n * 128, 0, True).meta
    unordered = expected[(expected[:, 0] * n + expected[:, 1] // 2).argsort()]
    measured = in_order(unordered, kv_heads, {})
    assert torch.equal(measured.unique(dim=0), expected.unique(dim=0))
    ends = [busy_until(x[:, 5].long()) for x in (measured, expected)]
    assert ends[0] <= 1.05 * ends[1]


def test_many_pairs_are_sorted_into_the_order_that_few_are_ranked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, pairs_of_head = 3, 50
    meta = torch.zeros(heads * pairs_of_head, 8, dtype=torch.int32)
    meta[:, 0] = torch.arange(len(meta)) // pairs_of_head
    meta[:, 1] = torch.arange(len(meta))
    meta[:, 5] = torch.randint(1, 20, (len(meta),))
    meta[::pairs_of_head, 5] = 300
    ranked = in_order(meta, heads, {})
    monkeypatch.setattr("s2train.kernels.hopper.topk_backward_schedule._MOST_RANKED", 0)
    assert in_order(meta, heads, {}).equal(ranked)


def test_the_order_of_slots_changes_nothing() -> None:
    layout, _ = both_layouts(128, 2, 2, 1, 0.5)
    order = torch.randperm(layout.slots)
    other = TopKLayout.from_indices(layout.indices[..., order], 128, num_heads=2, num_key_blocks=N_K)
    sizes = (2, N_Q * 128, N_K * 128, 0, True)
    assert pairs(topk_backward_schedule(layout, *sizes)) == pairs(topk_backward_schedule(other, *sizes))
    steps = [steps_of_tiles(topk_forward_schedule(x, causal=True, s_k=N_K * 128), 1, N_Q) for x in (layout, other)]
    assert steps[0] == steps[1]
