"""Start order of the backward's programs.

The order decides how well the programs use the GPU and its L2 cache.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from ..configs import multiprocessors

_LAGS = (0.0, 0.5, 1.0, 1.5, 2.0)  # tried in this order: less lag keeps more in the L2 cache
_TOLERANCE = 1.01  # a lag that ends this close to the best is accepted
_TOLERANCE_BY_QUERY_HEAD = 1.06  # what the cache gains where it is too small for a KV head's queries
_START_STEPS = 2  # cost of a program's start and end, in steps
_SIMULATED = 8192  # programs; of more, adjacent short ones count as one


def program_order(kv_head: Tensor, steps: Tensor, device: torch.device, member: Tensor | None = None) -> Tensor:
    """Order programs so that they share the L2 cache and end together.

    Programs are ordered by KV head, most steps first: concurrent programs then add to the same dq and read the same q.
    But the last head's long programs would run alone at the end. So the long programs (more than twice the median's
    steps) of KV head h start with the short ones of head h - lag. The lag is the smallest of a few values whose
    simulated end is within one per cent of the best.

    Args:
        kv_head, steps: int64 [programs]; a multiprocessor runs one program at a time.
        device: runs the programs; the tensors may lie elsewhere.
        member: int64 [programs], the query head within the group that a program mostly visits. If given, programs are
            ordered by query head, unless they then end much later.

    Returns:
        int64 [programs], a permutation.
    """
    short = (steps <= 2 * steps.median()).long()
    heaviest = steps.sort(descending=True, stable=True).indices
    at_once = multiprocessors(device)

    def best(head: Tensor) -> tuple[Tensor, float]:
        num_heads = int(head.max()) + 1
        unit = int(steps.max()) * at_once * num_heads / int(steps.sum())  # heads done while the longest program runs
        orders = []
        for lag in _LAGS:
            key = head + short * min(lag * unit, num_heads)
            orders.append(heaviest[key[heaviest].sort(stable=True).indices])
        ends = [_simulated_end(steps[order], short[order], at_once) for order in orders]
        limit = _TOLERANCE * min(ends)
        return next((order, end) for order, end in zip(orders, ends, strict=True) if end <= limit)

    order, end = best(kv_head)
    if member is not None:
        by_query_head, later_end = best(kv_head * (member.max() + 1) + member)
        if later_end <= _TOLERANCE_BY_QUERY_HEAD * end:
            return by_query_head
    return order


def _simulated_end(steps: Tensor, short: Tensor, at_once: int) -> float:
    """Simulate when the last program ends, in steps.

    Each program starts where the first running one ends.
    """
    work = steps + _START_STEPS
    if len(work) > _SIMULATED:
        # consecutive short programs of one length end about when their sum does
        run = torch.arange(len(work), device=work.device) // -(-len(work) // _SIMULATED)
        alone = short == 0
        first = torch.ones_like(alone)
        first[1:] = alone[1:] | alone[:-1] | (run[1:] != run[:-1])
        work = torch.zeros(int(first.sum()), dtype=work.dtype, device=work.device).index_add_(
            0, first.cumsum(0) - 1, work
        )
    ends = [0] * at_once
    for item in work.tolist():
        heapq.heapreplace(ends, ends[0] + item)
    return max(ends)
