"""Exchanging only the blocks that a layout keeps gives what one process gives, and moves what is predicted."""

import random
from unittest import mock

import pytest
import torch
from s2train.kernels import BlockLayout

from s2train.layouts.host_layout import HostLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.context_parallel.exchange_plan import (
    exchange_plan,
    exchanged_blocks,
    gathered_blocks,
    needed_blocks,
)
from tests.megatron.cp_processes import BLOCK, CASES, NAMES, WAYS, Result, run

Results = dict[tuple[str, str, torch.dtype], list[Result]]
BLOCKS_PER_CHUNK = {2: 3, 4: 2}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    size: int = request.param
    return run(size, BLOCKS_PER_CHUNK[size], tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
class TestOverProcesses:
    def test_results_and_gradients_are_those_of_one_process(self, ranks: Results, name: str, way: str) -> None:
        for result in ranks[name, way, torch.float64]:
            assert all(result.error[x] < 1e-13 for x in NAMES), result.error

    def test_they_are_as_exact_in_bfloat16(self, ranks: Results, name: str, way: str) -> None:
        for result in ranks[name, way, torch.bfloat16]:
            assert all(result.error[x] < 2 * result.allowed[x] for x in NAMES), result

    def test_no_byte_is_sent_beyond_the_prediction(self, ranks: Results, name: str, way: str) -> None:
        results = ranks[name, way, torch.bfloat16]
        predicted = results[0].predicted
        assert all(result.predicted.equal(predicted) for result in results)
        forward, backward = zip(*(result.sent for result in results), strict=True)
        assert torch.tensor(forward).equal(predicted)
        assert torch.tensor(backward).equal(predicted.T)


def random_layout(heads: int, num_blocks: int) -> BlockLayout:
    return BlockLayout.from_mask(torch.rand(heads, num_blocks, num_blocks) < random.random(), BLOCK)


@pytest.mark.parametrize(("size", "kv_heads"), [(2, 1), (2, 3), (3, 2), (4, 6)])
def test_a_rank_needs_what_any_head_of_the_group_keeps_for_its_queries(size: int, kv_heads: int) -> None:
    layout = random_layout(6, 4 * size)
    mask = layout.mask().tril()
    needed = needed_blocks(layout, kv_heads, size)
    for rank in range(size):
        rows = [row for chunk in chunk_ids(rank, size) for row in (2 * chunk, 2 * chunk + 1)]
        assert needed[rank].equal(mask[:, rows].any(1).view(kv_heads, -1, 4 * size).any(1))


def test_gathering_is_never_less() -> None:
    for size in (2, 3, 4):
        layout = random_layout(6, 4 * size)
        assert (exchanged_blocks(layout, 3, size) <= gathered_blocks(layout, 3, size)).all()


def test_what_one_rank_sends_is_what_the_other_expects() -> None:
    size, layout = 4, random_layout(6, 16)
    plans = [exchange_plan(layout, 3, rank, size) for rank in range(size)]
    expected = exchanged_blocks(layout, 3, size)
    for source in range(size):
        assert plans[source].sent_counts == expected[source].tolist()
        assert [plan.received[source] for plan in plans] == expected[source].tolist()


def test_the_parts_of_a_rank_keep_each_pair_of_its_queries_once() -> None:
    size, kv_heads, layout = 2, 3, random_layout(6, 12)
    for rank in range(size):
        plan = exchange_plan(layout, kv_heads, rank, size)
        own, remote, whole = (part.mask() for part in (*plan.apart(layout), plan.whole(layout)))
        assert whole[:, plan.slots :, plan.slots :].equal(own)
        assert whole[:, :, : plan.slots].equal(remote)
        rows = [row for chunk in chunk_ids(rank, size) for row in range(3 * chunk, 3 * chunk + 3)]
        mine = layout.mask()[:, rows]
        assert own.equal(mine[:, :, rows].tril())
        mine[:, :, rows] = False
        first = torch.tensor(rows)
        mine &= torch.arange(12) < first[:, None]
        assert remote.sum((1, 2)).equal(mine.sum((1, 2)))


@pytest.mark.parametrize("way", ["whole", "apart"])
def test_the_host_gets_one_copy_of_a_layout(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = random_layout(6, 12)
    plan, copy = exchange_plan(layout, 3, 0, 2), mock.Mock(side_effect=HostLayout.of)
    monkeypatch.setattr(HostLayout, "of", copy)
    getattr(plan, way)(layout)
    copy.assert_called_once_with(layout)


def test_blocks_that_cannot_be_dealt_are_rejected() -> None:
    with pytest.raises(ValueError, match="a multiple of 8 blocks"):
        exchange_plan(random_layout(2, 12), 1, 0, 4)
