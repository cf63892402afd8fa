"""The plan's memory beside the measured peak."""

import torch

from s2train.costs.memory import GIB, Memory
from s2train.distributed.agreement import max_over_ranks
from s2train.training.metrics import Tracker

PEAK_STEPS = 3  # after which the peak is taken: the first makes the optimizer's state, the others use it


def report_peak(planned: Memory, tracker: Tracker) -> None:
    """Note and record the peak of the fullest rank beside what was planned for it; call on all ranks together.

    Nothing on a CPU, where torch does not count.
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
        f"memory outside of torch's allocator: planned {planned.overhead / GIB:.2f} GiB, "
        f"{outside / GIB:.2f} on the fullest rank, other programs' included"
    )
    tracker.event(
        "memory",
        planned_gib=tensors / GIB,
        peak_gib=peak / GIB,
        planned_overhead_gib=planned.overhead / GIB,
        outside_gib=outside / GIB,
    )


def compare_peak(planned: int, peak: int) -> str:
    """One line; bytes."""
    share = peak / planned - 1
    where = "as planned" if abs(share) < 0.005 else f"{abs(share):.0%} {'above' if share > 0 else 'below'}"
    return f"memory of tensors on the fullest rank: planned {planned / GIB:.2f} GiB, peak {peak / GIB:.2f} ({where})"
