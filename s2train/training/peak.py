"""The plan's memory beside the measured peak."""

import torch

from s2train.planning.memory import GIB
from s2train.training.metrics import Tracker

PEAK_STEPS = 3  # after which the peak is taken: the optimizer's state is there from the first on


def report_peak(planned: int, tracker: Tracker) -> None:
    """Note and record the peak of the fullest rank beside what was planned for it; call on all ranks together.

    Nothing on a CPU, where torch does not count.

    Args:
        planned: bytes, without what the CUDA context and libraries take outside of torch.
    """
    if not torch.cuda.is_available():
        return
    peak = torch.tensor(torch.cuda.max_memory_allocated(), dtype=torch.float64, device="cuda")
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    tracker.note(compare_peak(planned, int(peak)))
    tracker.event("memory", planned_gib=planned / GIB, peak_gib=float(peak) / GIB)


def compare_peak(planned: int, peak: int) -> str:
    """One line; bytes."""
    share = peak / planned - 1
    where = "as planned" if abs(share) < 0.005 else f"{abs(share):.0%} {'above' if share > 0 else 'below'}"
    return f"memory of tensors on the fullest rank: planned {planned / GIB:.2f} GiB, peak {peak / GIB:.2f} ({where})"
