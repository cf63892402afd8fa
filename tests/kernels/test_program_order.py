"""The order of the Hopper backward's programs: no head's long ones run on alone, and heads stay together."""

import heapq

import pytest
import torch
from s2train.kernels.benchmarks.cases import parse_case
from s2train.kernels.configs import HOPPER_MULTIPROCESSORS
from s2train.kernels.hopper.backward_schedule import ScheduleOptions, backward_schedule
from s2train.kernels.hopper.program_order import program_order
from torch import Tensor


def programs(word: str) -> tuple[Tensor, Tensor]:
    """KV head and steps of each program of a benchmark's case, in the order in which they start."""
    case = parse_case(word)
    meta = backward_schedule(
        case.layout(torch.device("cpu")), case.kv_heads, case.length, case.length, 0, True
    ).meta.long()
    return meta[:, 0], meta[:, 5]


def busy_until(steps: Tensor) -> int:
    """When the last program ends, if each starts where the first running one ends: in steps."""
    ends = [0] * HOPPER_MULTIPROCESSORS
    for item in steps.tolist():
        heapq.heapreplace(ends, ends[0] + item)
    return max(ends)


def idle_share(steps: Tensor) -> float:
    """Share of the multiprocessors' time that is idle at the end."""
    return 1 - int(steps.sum()) / (busy_until(steps) * HOPPER_MULTIPROCESSORS)


@pytest.mark.parametrize("word", ["b128-l8-v16-8k", "b128-l8-v16-32k", "b128-l8-v16-32k-kv8", "b128-l2-v64-32k"])
def test_long_programs_start_early_enough_to_end_with_the_others(word: str) -> None:
    heads, steps = programs(word)
    by_head = steps.sort(descending=True, stable=True).indices
    by_head = by_head[heads[by_head].sort(stable=True).indices]
    assert idle_share(steps) < 0.04
    assert idle_share(steps[by_head]) > 2 * idle_share(steps)


def test_long_programs_that_run_together_sweep_over_few_query_heads() -> None:
    case = parse_case("b128-l8-v16-32k-kv8")
    layout = case.layout(torch.device("cpu"))
    heads = {}
    for by_query_head in (False, True):
        options = ScheduleOptions(by_query_head=by_query_head)
        schedule = backward_schedule(layout, case.kv_heads, case.length, case.length, 0, True, options=options)
        assert idle_share(schedule.meta[:, 5].long()) < 0.05
        long = [row for row in schedule.meta.tolist() if row[5] > 200]
        # each sweeps over the head that keeps its column
        sweeps = [
            (row[0], int(torch.bincount(schedule.steps[row[3] : row[3] + row[5]] >> 22).argmax())) for row in long
        ]
        runs = [len(set(sweeps[i : i + 64])) for i in range(0, len(sweeps) - 64, 64)]
        heads[by_query_head] = sum(runs) / len(runs)
    assert heads[True] < 0.75 * heads[False]


def test_heads_stay_together_where_their_programs_end_together_anyway() -> None:
    heads, _ = programs("b128-l8-v1-8k")
    assert heads.tolist() == sorted(heads.tolist())


def test_every_program_starts_once() -> None:
    heads = torch.arange(4).repeat_interleave(5000)
    steps = torch.randint(1, 30, (20000,)) + 500 * (torch.rand(20000) < 0.1)
    assert program_order(heads, steps, steps.device).sort().values.equal(torch.arange(20000))
