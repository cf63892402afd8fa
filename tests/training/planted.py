"""launch/pretrain.py with a fault planted in it, to be run as that is; S2TRAIN_TEST_FAULT names a function below.

As `name:rank:step`, of the job's first attempt.
"""

import errno
import hashlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def at_step(step: int, fault: Callable[[], None]) -> None:
    """Let `fault` happen where training comes to a step, within its forward pass."""
    from s2train.training import loop

    run_step = loop.run_step
    count = iter(range(1, 1 << 30))

    def planted(*args: Any, **kwargs: Any) -> float:
        if next(count) == step:
            fault()
        return run_step(*args, **kwargs)

    loop.run_step = planted


def die(step: int) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def hang(step: int) -> None:
    at_step(step, lambda: time.sleep(1e6))


def freeze(step: int) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def user_signal(step: int) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def nan(step: int) -> None:
    """This rank's gradient norm is not a number at `step`. Every rank tells what the step left of its state."""
    from s2train.training import loop

    measure, take = loop.gradient_norm, loop.Trainer._step
    is_here = os.environ["RANK"] == os.environ["S2TRAIN_TEST_FAULT"].split(":")[1]

    def recorded(self: Any, batches: Any, number: int, consumed: int) -> Any:
        if number != step:
            return take(self, batches, number, consumed)
        before = fingerprint(self.state)
        loop.gradient_norm = lambda optimizer: measure(optimizer) * (float("nan") if is_here else 1.0)
        result = take(self, batches, number, consumed)
        loop.gradient_norm = measure
        same = fingerprint(self.state) == before
        print(f"rank {os.environ['RANK']} step {step} left its state {'alone' if same else 'changed'}", flush=True)
        return result

    loop.Trainer._step = recorded


def fingerprint(state: Any) -> str:
    """Of the optimizer's weights and moments and of the schedule. (The model's weights may be gathered late.)"""
    digest = hashlib.sha256(str(state.scheduler.state_dict()).encode())
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                digest.update(parameter.detach().cpu().numpy().tobytes())
        for moments in part.optimizer.state.values():
            for value in moments.values():
                digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def full_disk(step: int) -> None:
    """The checkpoint after `step` finds no room for a shard."""
    fsync = os.fsync

    def planted(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f"iter_{step:07d}" in path and path.endswith(".distcp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = planted


def short_of_memory(step: int) -> None:
    """The machine has no room for a copy of the optimizer's state on every rank."""
    from s2train.checkpoints import run_state as checkpoint

    checkpoint.lacks_room_for_copies = lambda chunks: True


if __name__ == "__main__":
    name, *numbers = os.environ["S2TRAIN_TEST_FAULT"].split(":")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        rank, step = (int(number) for number in numbers)
        everywhere = name in ("nan", "full_disk")
        if everywhere or int(os.environ["RANK"]) == rank:
            globals()[name](step)
    sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(sys.argv[0], run_name="__main__")
