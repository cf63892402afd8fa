"""Long columns of the backward, split over programs: what each part visits, and that the gradients stay right."""

import os
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout, TopKLayout, block_sparse_attention, column_parts
from s2train.kernels.check import run_time
from s2train.kernels.column_parts import cut_columns, most_slots, trimmed
from s2train.kernels.hopper import pair_parts
from s2train.kernels.hopper.backward_schedule import backward_schedule
from s2train.kernels.hopper.topk_backward_schedule import topk_backward_schedule
from s2train.kernels.interpreter import repair_interpreter

from tests.kernels.cases import Problem, assert_as_exact_as_torch, gradients

repair_interpreter()
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are long from few visits on: a device of 16 multiprocessors, which has 42 slots."""
    for module in (column_parts, pair_parts):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 16)
    monkeypatch.setattr(column_parts, "LEAST_ROWS", 64)
    monkeypatch.setattr(pair_parts, "LEAST_STEPS", 3)


def uneven_work(columns: int) -> torch.Tensor:
    work = torch.randint(0, 40, (columns,))
    return torch.where(torch.rand(columns) < 0.1, work * 50, work)


def test_parts_visit_each_column_once_and_fit_their_slots() -> None:
    for _ in range(100):
        columns, copies, at_once, least = (int(torch.randint(*x, (1,))) for x in ((1, 60), (1, 4), (6, 40), (2, 20)))
        work = uneven_work(columns)
        cut = cut_columns(work, least, copies, at_once)
        seen = torch.zeros(columns, dtype=torch.int64).index_add_(0, cut.column, cut.high - cut.low)
        assert seen.equal(work)
        used = cut.slot[cut.slot >= 0]
        assert used.sort().values.equal(torch.arange(len(used)))
        assert len(used) == int(cut.count.sum()) <= most_slots(copies, at_once) == cut.slots


def test_no_part_outlasts_three_quarters_of_a_multiprocessors_work() -> None:
    for _ in range(100):
        work, at_once, least = uneven_work(50), 20, 8
        cut = cut_columns(work, least, 1, at_once)
        limit = max(least, -(-3 * int(work.sum()) // (4 * at_once)))
        assert int((cut.high - cut.low).max()) <= limit
        heavy = cut.heavy[cut.count > 0]
        assert heavy.equal((work > limit).nonzero().flatten())
        assert int((cut.high - cut.low)[cut.slot >= 0].amin()) >= limit // 2 if len(heavy) else True


def test_a_layout_without_long_columns_is_not_split() -> None:
    assert trimmed(cut_columns(torch.full((300,), 9), 2, 1, 132)) is None
    layout = BlockLayout.from_mask(torch.ones(2, 8, 8).tril() > 0, 128)
    sizes = (2, 1024, 1024, 0, True)
    split, whole = backward_schedule(layout, *sizes, copies=1), backward_schedule(layout, *sizes)
    assert split.parts is None
    assert split.meta.equal(whole.meta)
    assert column_parts.column_parts(layout, 2, 1, 128) is None


def test_lists_that_can_have_no_long_column_are_not_split() -> None:
    layout = TopKLayout.from_indices(torch.zeros(1, 2, 8, 2, dtype=torch.int32), 128, num_heads=2)
    assert column_parts.column_parts(layout, 2, 1, 128) is None
    assert pair_parts.most_topk_slots(layout.device, steps=16) == 0


def test_packed_documents_keep_their_programs(device: torch.device) -> None:
    bounds = torch.tensor([0, 37, 37, 60], dtype=torch.int32, device=device)
    inputs, layout, dout, _ = Problem(heads=1, kv_heads=1, s_q=60, s_k=60, options={"cu_seqlens": bounds}).make(device)
    found = []
    for split in (False, True):
        out = block_sparse_attention(*inputs, layout, cu_seqlens=bounds, backend="portable", split_columns=split)
        found.append(torch.autograd.grad(out, inputs, dout))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("poisoned", "small_device")
@pytest.mark.parametrize(
    "problem",
    [
        Problem(sink=True, heads=4, kv_heads=2, s_q=61, s_k=61, block=16),
        Problem(sink=True, s_q=130, s_k=130, block=64, dtype=torch.float16, v_dim=24),
        Problem(
            sink=True, s_q=50, s_k=90, batch=2, layout="static batch", options={"query_offset": 37, "format": "bhsd"}
        ),
        Problem(sink=True, heads=4, kv_heads=2, s_q=97, s_k=97, batch=2, dtype=torch.bfloat16, layout="top-k shared"),
        Problem(sink=True, heads=3, kv_heads=1, s_q=75, s_k=40, layout="top-k", options={"causal": False}),
    ],
    ids=["GQA", "float16", "masks of each sequence, offset", "top-k, bfloat16", "top-k, MQA, not causal"],
)
def test_gradients_are_as_exact_as_torch(problem: Problem, device: torch.device) -> None:
    with SlotsSeen() as seen:
        assert_as_exact_as_torch(problem, "portable", device, split_columns=True)
    assert seen.slots


class SlotsSeen:
    """Notes the slots of the layouts that are split meanwhile."""

    def __enter__(self) -> "SlotsSeen":
        self.patch, self.slots = pytest.MonkeyPatch(), 0

        def noting(*arguments: Any) -> Any:
            cut = cut_columns(*arguments)
            self.slots += int(cut.count.sum())
            return cut

        self.patch.setattr(column_parts, "cut_columns", noting)
        return self

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.mark.usefixtures("poisoned", "small_device")
def test_gradients_are_bitwise_the_same_in_every_run(device: torch.device) -> None:
    inputs, layout, dout, dlse = Problem(sink=True, heads=4, kv_heads=2, layout="top-k").make(device)
    runs = []
    for _ in range(2):
        out, lse = block_sparse_attention(*inputs, layout, return_lse=True, backend="portable", split_columns=True)
        runs.append(gradients(out, lse, inputs, dout, dlse))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("small_device")
def test_steps_with_new_lists_leave_nothing_behind(device: torch.device) -> None:
    inputs, layout, _, _ = Problem(heads=2, kv_heads=1, s_q=33, s_k=33, layout="top-k shared").make(device)
    left = run_time.fresh_steps(inputs, layout, {"split_columns": True}, 0.5, 1, backend="portable")
    assert run_time.is_nothing(left)


@interpreted
@pytest.mark.usefixtures("small_device")
def test_lists_are_cut_on_the_device_as_static_pairs_are_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_parts, "_AT_ONCE", 16)
    kv_heads, pairs = 2, 19
    work = uneven_work(kv_heads * pairs) + 1
    steps = torch.randint(1000, (int(work.sum()),), dtype=torch.int32)
    meta = torch.zeros(len(work), 8, dtype=torch.int32)
    meta[:, 0] = torch.arange(len(work)) // pairs
    meta[:, 1] = torch.arange(len(work)) % pairs * 2
    meta[:, 2], meta[:, 5] = meta[:, 1] + 1, work
    meta[:, 3] = work.cumsum(0) - work
    meta[:, 4] = (torch.rand(len(work)) * (work + 1)).int()
    meta[:, 6] = steps[meta[:, 3].long()]
    layout = TopKLayout.from_indices(torch.zeros(1, 2, pairs, 2, dtype=torch.int32), 128, num_heads=2)
    sums, taken = torch.zeros(21, 6, dtype=torch.int32), work.sum().int()[None]
    rows, parts = pair_parts.cut_topk_pairs(meta, steps, taken, sums, layout, kv_heads, pairs * 128)
    works = rows[:, 5] > 0
    measured = torch.cat([rows[works], parts.slots[works, None]], 1)
    cut = pair_parts.cut_pairs(meta.long(), steps, 1, meta.device)
    if cut is None:  # no pair happens to be long
        assert rows[works].equal(meta)
        return
    expected = torch.cat([cut[0].int(), cut[1].slots[:, None]], 1)
    assert measured[measured[:, 3].argsort()].equal(expected[expected[:, 3].argsort()])
    assert sums[: len(cut[1].sums)].equal(cut[1].sums)
    assert not sums[len(cut[1].sums) :].any()
    assert bool((rows[~works, 1] == 2 * pairs).all())  # beyond the last key: they store nothing


@interpreted
@pytest.mark.usefixtures("small_device")
def test_cut_lists_keep_the_steps_that_whole_ones_have() -> None:
    indices = run_time.random_indices(1, 2, 5, 5, 0.6)
    indices[..., -1] = 0
    layout = TopKLayout.from_indices(indices, 64, num_heads=4, num_key_blocks=5)
    sizes = (2, 5 * 64 - 11, 5 * 64 - 11, 0, True)
    whole, split = topk_backward_schedule(layout, *sizes), topk_backward_schedule(layout, *sizes, cut=True)
    assert split.parts is not None
    assert int((split.parts.slots >= 0).sum()) == int(split.parts.sums[:, 1].sum()) > 0

    def steps(schedule: Any) -> list[tuple[int, ...]]:
        rows = schedule.meta.tolist()
        return sorted((*r[:3], r[7], int(schedule.steps[r[3] + t]), t < r[4]) for r in rows for t in range(r[5]))

    assert steps(split) == steps(whole)
