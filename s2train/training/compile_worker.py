"""Compiles one part of a run's kernels; `s2train.training.compilers` starts it."""

import gc
import os
import time

from s2train.distributed.parent_death_signal import signal_on_parent_death
from s2train.training.worker_process import read_task


def main() -> None:
    """Compile what standard input says; print the seconds since the start."""
    signal_on_parent_death()
    gc.disable()  # imports make no garbage, and the process is short
    import torch

    from s2train.training.compilers import Task, compile_here

    task: Task | None = read_task()
    if task is None:
        return
    torch.cuda.set_device(task.device)
    compile_here(task)
    print(f"{time.monotonic() - task.began:.1f}", flush=True)
    os._exit(0)  # the caches are on disk; the CUDA context's end would take time


if __name__ == "__main__":
    main()
