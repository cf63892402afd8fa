"""Compares the planned memory with the measured peak."""

import torch

from s2train.costs.memory import GIB, Memory
from s2train.distributed.agreement import max_over_ranks
from s2train.training.metrics import Tracker

PEAK_STEPS = 3  # the peak is read after this many steps: the first creates the optimizer's state, the others use it


def report_peak(planned: Memory, tracker: Tracker) -> None:
    """Log the peak memory of the fullest rank and its planned memory.

    Collective: call it on all ranks. Does nothing on a CPU, where torch does not count memory.
    """
    if not torch.cuda.is_available():
        return
    free, total = torch.cuda.mem_get_info()
    peak, outside = max_over_ranks(
        torch.cuda.max_memory_allocated(), max(0, total - free - torch.cuda.memory_reserved())
    )
    tensors = planned.total - planned.overhead
    tracker.note(compare_peak(tensors, peak))
    tracker.note(
        f"memory outside torch's allocator: planned {planned.overhead / GIB:.2f} GiB, "
        f"{outside / GIB:.2f} on the fullest rank, including other programs"
    )
    tracker.event(
        "memory",
        planned_gib=tensors / GIB,
        peak_gib=peak / GIB,
        planned_overhead_gib=planned.overhead / GIB,
        outside_gib=outside / GIB,
    )


def compare_peak(planned: int, peak: int) -> str:
    """Format planned and peak memory, given in bytes, as one line."""
    share = peak / planned - 1
    where = "as planned" if abs(share) < 0.005 else f"{abs(share):.0%} {'above' if share > 0 else 'below'}"
    return f"memory of tensors on the fullest rank: planned {planned / GIB:.2f} GiB, peak {peak / GIB:.2f} ({where})"
