"""Runs launch/pretrain.py with an injected fault.

S2TRAIN_TEST_FAULT is `name:rank:step`; `name` is a function below. The fault occurs in the job's first attempt only.
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

import torch

ROOT = Path(__file__).parents[2]


def is_planted_here() -> bool:
    return os.environ["RANK"] == os.environ["S2TRAIN_TEST_FAULT"].split(":")[1]


def at_step(step: int, fault: Callable[[], None]) -> None:
    """Inject `fault` into the forward pass of a training step."""
    from s2train.training import loop

    run_step = loop.run_step
    count = iter(range(1, 1 << 30))

    def planted(*args: Any, **kwargs: Any) -> float:
        if next(count) == step:
            fault()
        return run_step(*args, **kwargs)

    loop.run_step = planted


def note_signals() -> list[int]:
    """The signals to stop that come from now on."""
    from s2train.training.signals import StopSignals

    came, remember = list[int](), StopSignals._remember

    def noting(self: StopSignals, number: int, frame: Any) -> None:
        came.append(number)
        remember(self, number, frame)

    StopSignals._remember = noting  # type: ignore[method-assign]
    return came


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.05)


def die(step: int) -> None:
    """Die at `step`, which the other ranks take when the launcher has seen it and sends them SIGTERM.

    The launcher names the first of those that have ended when it looks: a rank that misses its peer ends at once.
    """
    came, here = note_signals(), is_planted_here()
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL) if here else wait_until(lambda: came))


def waits(step: int) -> None:
    """Wait before `step` for a signal to stop, or until the run's folder has a file `go`."""
    (folder,) = [Path(word.removeprefix("run_dir=")) for word in sys.argv if word.startswith("run_dir=")]
    came = note_signals()
    at_step(step, lambda: wait_until(lambda: came or (folder / "go").exists()))


def hang(step: int) -> None:
    """Make no progress from `step` on, which the other ranks reach three seconds later."""
    if is_planted_here():
        at_step(step, lambda: time.sleep(1e6))
        return
    from s2train.training.watchdog import Watchdog

    beat = Watchdog.beat

    def late(self: Watchdog, doing: str) -> None:
        if doing == f"step {step}":
            time.sleep(3.0)
        beat(self, doing)

    Watchdog.beat = late  # type: ignore[method-assign]


def freeze(step: int) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def user_signal(step: int) -> None:
    at_step(step, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def nan(step: int) -> None:
    """Make this rank's gradient norm NaN at `step`.

    Every rank prints whether the step changed its state.
    """
    from s2train.training import loop

    measure, train, states = loop.squared_gradient_norm, loop.Trainer.train, []
    factor = float("nan") if is_planted_here() else 1.0

    def recorded(self: Any, progress: Any) -> Any:
        states.append(self.state)
        return train(self, progress)

    def spoil() -> None:
        states.append(fingerprint(states[0]))
        loop.squared_gradient_norm = lambda optimizer: measure(optimizer) * factor

    def compare() -> None:
        loop.squared_gradient_norm = measure
        same = fingerprint(states[0]) == states[1]
        print(f"rank {os.environ['RANK']} step {step}: state {'unchanged' if same else 'changed'}", flush=True)

    loop.Trainer.train = recorded
    at_step(step, spoil)
    at_step(step + 1, compare)


def masked(step: int) -> None:
    """Let no token of `step` and of the evaluation after it count in the loss."""
    from s2train.training import steps

    loss = steps.token_loss

    def of_no_token(loss_mask: torch.Tensor, edges: list[int] | None, losses: torch.Tensor) -> Any:
        return loss(torch.zeros_like(loss_mask), edges, losses)

    at_step(step, lambda: setattr(steps, "token_loss", of_no_token))
    at_step(step + 2, lambda: setattr(steps, "token_loss", loss))


def reads(step: int) -> None:
    """Print the functions that read several values from a device in `step`."""
    read, readers = torch.Tensor.tolist, list[str]()

    def noted(self: torch.Tensor) -> Any:
        if (caller := sys._getframe(1).f_code.co_name) != "__torch_function__":  # s2train.megatron.cpu's, in between
            readers.append(caller)
        return read(self)

    def stop() -> None:
        torch.Tensor.tolist = read
        print(f"step {step} read by {', '.join(readers)}", flush=True)

    at_step(step, lambda: setattr(torch.Tensor, "tolist", noted))
    at_step(step + 1, stop)


def fingerprint(state: Any) -> str:
    """Hash of the optimizer's weights and moments and the learning-rate schedule.

    The model's weights may be stale until the next gather.
    """
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
    """Fail to write a shard of the checkpoint after `step`, as on a full disk."""
    fsync = os.fsync

    def planted(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f"iter_{step:07d}" in path and path.endswith(".distcp"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    os.fsync = planted


def slow_writer(step: int) -> None:
    """Write the checkpoint after `step` slowly; print when ranks agree that a background save is done."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller

    fsync, agree = os.fsync, AsyncCaller.sync_all_async_calls

    def slow(descriptor: int) -> None:
        if f"iter_{step:07d}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            time.sleep(0.5)
        fsync(descriptor)

    def noted(self: AsyncCaller, is_alive: int) -> bool:
        print("ranks agree on their writers", flush=True)
        return agree(self, is_alive)

    os.fsync, AsyncCaller.sync_all_async_calls = slow, noted


def power_loss(step: int) -> None:
    """Empty what the checkpoint after `step` left unsynced when it was renamed, as a power loss may.

    The writers sync the shards.
    """
    fsync, rename, synced = os.fsync, Path.rename, set()

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def planted(self: Path, target: Path) -> Path:
        renamed = rename(self, target)
        if renamed.name == f"iter_{step:07d}":
            for path in renamed.iterdir():
                if path.suffix != ".distcp" and path.stat().st_ino not in synced:
                    os.truncate(path, 0)
        return renamed

    os.fsync, Path.rename = noting, planted


def short_of_memory(step: int) -> None:
    """Pretend that host memory is too small for a copy of the optimizer state on every rank."""
    from s2train.checkpoints import run_state

    run_state.lacks_room_for_copies = lambda chunks: True


if __name__ == "__main__":
    name, *numbers = os.environ["S2TRAIN_TEST_FAULT"].split(":")
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        step = int(numbers[1])
        everywhere = name in ("die", "hang", "nan", "masked", "full_disk")
        if everywhere or is_planted_here():
            globals()[name](step)
    sys.argv[0] = str(ROOT / "launch" / "pretrain.py")
    sys.path.insert(0, str(ROOT / "launch"))
    runpy.run_path(sys.argv[0], run_name="__main__")
