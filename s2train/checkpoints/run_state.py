"""Saving and loading all that a run needs to go on."""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from s2train.checkpoints.async_writers import start_results_manager
from s2train.checkpoints.folders import (
    Progress,
    checkpoints_in,
    folder_name,
    is_own,
    load_shards,
    own_checkpoints,
    read_progress,
    sharding_metadata,
    step_of,
    write_config,
)
from s2train.checkpoints.integrity import CONFIG, PROGRESS, forget_failed_load, note_failed_load
from s2train.checkpoints.optimizer_state_conversion import fit_groups
from s2train.checkpoints.random_state import rng_ranks_here, set_rng, sharded_rng
from s2train.config import OptimConfig, PretrainConfig
from s2train.distributed.agreement import broadcast_from_rank_0, max_over_ranks
from s2train.errors import ConfigError, TrainingError
from s2train.files import replacing
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.model import unwrap
from s2train.megatron.torch_adam import separate_steps


@dataclass
class TrainingState:
    """What the shards of a checkpoint hold."""

    chunks: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class Saver:
    """Saves a run's checkpoints, every method on all ranks together.

    A checkpoint is written under a temporary name of its own, and renamed once all ranks have written theirs. With
    `checkpoint.async_save` forked processes write while training goes on; a new save waits for the one under way.

    Args:
        published: called with the step and the folder of each checkpoint once it is whole.
    """

    def __init__(self, cfg: PretrainConfig, state: TrainingState, published: Callable[[int, Path], None]) -> None:
        self._cfg, self._state, self._published = cfg, state, published
        self._root = own_checkpoints(cfg.run_dir)
        self._is_first = torch.distributed.get_rank() == 0
        self._results = start_results_manager()
        self._queue = AsyncCallsQueue()
        self._under_way: tuple[int, Path] | None = None

    def save(self, progress: Progress) -> Path:
        """Save, or begin to; returns where the checkpoint is or will be.

        Raises:
            TrainingError: it can't be written, or the folder is there already: another job is at work there.
        """
        self.wait()
        cfg, metadata = self._cfg, sharding_metadata()
        # Each data parallel rank gets the whole state over NCCL; or rank 0 alone does over gloo, which takes longer.
        (is_short,) = max_over_ranks(lacks_room_for_copies(self._state.chunks))
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = bool(is_short)
        final = self._root / folder_name(progress.step)
        # An orphan of a killed run may still be writing to a folder of its own.
        temporary = broadcast_from_rank_0(
            self._root / f".{final.name}.{secrets.token_hex(4)}.partial" if self._is_first else None
        )
        self._under_way = (progress.step, temporary)
        with self._told():
            if self._is_first:
                temporary.mkdir(parents=True)
            torch.distributed.barrier()
            content = _sharded_state(self._state, metadata, is_loading=False)
            content["scheduler"] = self._state.scheduler.state_dict()
            content["rng"] = sharded_rng()
            tags = {k: v for k, v in metadata.items() if isinstance(v, str)}
            request = save_checkpoint_shards(content, str(temporary), tags, in_background=cfg.checkpoint.async_save)
            publish = partial(self._publish, progress, temporary, final)
            if request is None:
                publish()
            else:
                request.add_finalize_fn(publish)
                self._queue.schedule_async_request(request)
        return final

    def poll(self) -> None:
        """Finish a save whose writers are done; errors as `save`'s."""
        with self._told():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Finish a save that is under way; errors as `save`'s."""
        with self._told():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish, and end the helper process."""
        self.wait()
        self._results.shutdown()

    def _publish(self, progress: Progress, temporary: Path, final: Path) -> None:
        """Give a written checkpoint its name, and remove those that are no longer kept."""
        problem = self._rename(progress, temporary, final) if self._is_first else ""
        problem = broadcast_from_rank_0(problem)
        if problem:
            raise OSError(problem)
        self._under_way = None
        if self._is_first:
            self._published(progress.step, final)

    def _rename(self, progress: Progress, temporary: Path, final: Path) -> str:
        keeping = self._cfg.checkpoint
        try:
            write_config(self._cfg, temporary / CONFIG)
            progress.write(temporary / PROGRESS)
            if final.exists():
                return f"{final} exists: is another job at work in {self._cfg.run_dir}?"
            temporary.rename(final)
            with replacing(self._root / "latest_checkpointed_iteration.txt") as latest:
                latest.write_text(str(progress.step))
            if not progress.health.get("skipped_in_row"):  # else the older ones may be the better ones
                for old in surplus(checkpoints_in(self._root), keeping.keep, keeping.keep_every):
                    _remove(old)
        except OSError as error:
            return str(error)
        return ""

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of writing, as one that tells what is left."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # a CheckpointException is no Exception
            assert self._under_way is not None
            step, temporary = self._under_way
            if self._is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            there = checkpoints_in(self._root)
            left = (
                f"The checkpoints there are whole; the same command resumes from {there[-1].name}"
                if there
                else "There is no older one; the same command starts afresh"
            )
            raise TrainingError(
                f"run_dir={self._cfg.run_dir}: step {step} can't be saved ({_reason(error)}). {left}, once there is"
                " room (checkpoint.keep=N keeps fewer) and the folder can be written"
            ) from error


def lacks_room_for_copies(chunks: list[Any]) -> bool:
    """Whether this machine's ranks could not hold a model's optimizer state each (12 bytes a parameter), and as much
    again while writing, in the machine's memory."""
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    needed = 2 * 12 * parameters * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return needed > psutil.virtual_memory().available


def _remove(checkpoint: Path) -> None:
    """Half removed, it would be taken for a damaged one; what is left under another name, the next run clears away."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.partial")
    with suppress(FileNotFoundError):
        shutil.rmtree(checkpoint.rename(hidden), ignore_errors=True)


def surplus(checkpoints: list[Path], keep: int | None, keep_every: int | None) -> list[Path]:
    """Which checkpoints, of these from old to new, are not among the last `keep`, nor at multiples of `keep_every`."""
    if keep is None:
        return []
    return [path for path in checkpoints[:-keep] if keep_every is None or step_of(path) % keep_every]


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on whichever rank."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load(cfg: PretrainConfig, state: TrainingState, checkpoint: Path, rng_ranks: list[int] | None) -> None:
    """Load model, optimizer and schedule in place, and this rank's random generators; of weights alone the model.

    Args:
        rng_ranks: [tp, pp] of the run whose generators the checkpoint holds; other ranks keep their fresh ones.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    weights_only = read_progress(checkpoint).weights_only
    if weights_only:
        wanted = _sharded_model(state, sharding_metadata())
    else:
        wanted = _sharded_state(state, sharding_metadata(), is_loading=True)
    if has_rng := rng_ranks == rng_ranks_here():
        wanted["rng"] = sharded_rng()
    may_go_back = is_own(checkpoint, cfg.run_dir)
    try:
        loaded = load_shards(wanted, checkpoint, "checkpoint.resume")
    except ConfigError as error:
        if may_go_back:  # behind it, then
            note_failed_load(checkpoint, error.problem)
        raise
    if may_go_back and torch.distributed.get_rank() == 0:
        forget_failed_load(checkpoint)
    for chunk, name in zip(state.chunks, _chunk_names(state.chunks), strict=True):
        unwrap(chunk).load_state_dict(loaded[name])
    if weights_only:
        state.optimizer.reload_model_params()  # its copies in fp32
        return
    _set_hyperparameters(cfg.optim, loaded["optimizer"])
    fit_groups(state.optimizer, loaded["optimizer"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    if has_rng:
        set_rng(loaded["rng"])


def _set_hyperparameters(optim: OptimConfig, loaded: Any) -> None:
    """Put the command line's into a loaded optimizer state, in place of the checkpoint's.

    Before Megatron loads it: 0.19 tells parameter groups apart by their learning rates.
    """
    if isinstance(loaded, dict):
        for group in loaded.get("param_groups", []):
            group.update(max_lr=optim.lr, min_lr=optim.lowest_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        for value in loaded.values():
            _set_hyperparameters(optim, value)
    elif isinstance(loaded, list | tuple):
        for value in loaded:
            _set_hyperparameters(optim, value)


def _chunk_names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _sharded_model(state: TrainingState, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(state.chunks), state.chunks, strict=True)
    }


def _sharded_state(state: TrainingState, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    names = _chunk_names(state.chunks)
    model = _sharded_model(state, metadata)
    optimizer = state.optimizer.sharded_state_dict(
        model["model"] if len(names) == 1 else model, is_loading=is_loading, metadata=metadata
    )
    return {**model, "optimizer": optimizer}
