"""Saves and loads the state that a run needs to resume."""

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
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from s2train.checkpoints.async_writers import start_results_manager
from s2train.checkpoints.folders import Progress, write_config
from s2train.checkpoints.integrity import CONFIG, PROGRESS, clear_failed_load, record_failed_load
from s2train.checkpoints.listing import checkpoints_in, folder_name, is_own, own_checkpoints, step_of
from s2train.checkpoints.missing_weights import leave_out_missing
from s2train.checkpoints.optimizer_state_conversion import convert_param_groups
from s2train.checkpoints.random_state import current_rng_ranks, set_rng, sharded_rng
from s2train.checkpoints.resume import loads_weights_alone
from s2train.checkpoints.shards import load_shards, readable_entries, sharding_metadata
from s2train.command_line.commands import shell_setting
from s2train.config import OptimConfig, PretrainConfig
from s2train.distributed.agreement import broadcast_from_rank_0, max_over_ranks
from s2train.errors import ConfigError, TrainingError, message_line
from s2train.files import replacing, sync
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.local_optimizer_state import has_shifted_weights
from s2train.megatron.model import unwrap
from s2train.megatron.optimizer_state import count_steps_in_parts, param_groups_in, remove_classes
from s2train.megatron.torch_adam import move_steps_to_host, separate_steps


@dataclass
class TrainingState:
    """What the shards of a checkpoint hold."""

    chunks: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


class Saver:
    """Saves a run's checkpoints; every method but `is_writing` is collective.

    A checkpoint is written under a unique temporary name and renamed when all ranks have written their shards. With
    `checkpoint.async_save`, forked processes write while training continues; a new save waits for the pending one.

    Args:
        on_published: called with the step and the folder of each checkpoint when it is complete.
    """

    def __init__(self, cfg: PretrainConfig, state: TrainingState, on_published: Callable[[int, Path], None]) -> None:
        self._cfg, self._state, self._on_published = cfg, state, on_published
        self._root = own_checkpoints(cfg.run_dir)
        self._is_first = torch.distributed.get_rank() == 0
        self._results = start_results_manager()
        self._queue = AsyncCallsQueue()
        self._pending: tuple[int, Path] | None = None

    def save(self, progress: Progress) -> Path:
        """Save a checkpoint, or start an asynchronous save.

        Returns:
            Folder of the checkpoint, which may still be written.
        Raises:
            TrainingError: it can't be written, or the folder exists because another job is running there.
        """
        self.wait()
        cfg, metadata = self._cfg, sharding_metadata()
        # Either each data parallel rank gathers the whole state over NCCL, or only rank 0 does over gloo, more slowly.
        (is_short,) = max_over_ranks(lacks_room_for_copies(self._state.chunks))
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = bool(is_short)
        final = self._root / folder_name(progress.step)
        # Unique, because an orphaned writer of a killed run may still be writing to its folder.
        temporary = broadcast_from_rank_0(
            self._root / f".{final.name}.{secrets.token_hex(4)}.partial" if self._is_first else None
        )
        self._pending = (progress.step, temporary)
        with self._describe_errors():
            if self._is_first:
                temporary.mkdir(parents=True)
            torch.distributed.barrier()
            content = sharded_state(self._state, metadata, is_loading=False)
            remove_classes(content["optimizer"])
            move_steps_to_host(content["optimizer"])
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

    def is_writing(self) -> bool:
        """Return whether this rank's writer of a background save is at work."""
        calls = self._queue.async_calls
        return bool(calls) and not calls[0].async_caller.is_current_async_call_done(no_dist=True)

    def poll(self) -> None:
        """Finish a save whose writers are done; raises what `save` raises.

        While one is pending, the host waits for the GPU: call it when no rank is writing.
        """
        with self._describe_errors():
            self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Wait for a pending save and finish it; raises what `save` raises."""
        with self._describe_errors():
            self._queue.maybe_finalize_async_calls(blocking=True)

    def close(self) -> None:
        """Finish a pending save, and stop the helper process."""
        self.wait()
        self._results.shutdown()

    def _publish(self, progress: Progress, temporary: Path, final: Path) -> None:
        """Rename a complete checkpoint to its final name, and remove old ones."""
        problem = self._rename(progress, temporary, final) if self._is_first else ""
        problem = broadcast_from_rank_0(problem)
        if problem:
            raise OSError(problem)
        self._pending = None
        if self._is_first:
            self._on_published(progress.step, final)

    def _rename(self, progress: Progress, temporary: Path, final: Path) -> str:
        keeping = self._cfg.checkpoint
        try:
            write_config(self._cfg, temporary / CONFIG)
            progress.write(temporary / PROGRESS)
            if final.exists():
                return f"{final} exists: is another job running in {self._cfg.run_dir}?"
            for path in (*temporary.iterdir(), temporary):  # Megatron syncs only the shards
                sync(path)
            temporary.rename(final)
            sync(self._root)
            with replacing(self._root / "latest_checkpointed_iteration.txt") as latest:
                latest.write_text(str(progress.step))
            if not progress.health.get("skipped_in_row"):  # after a skipped step, older checkpoints may be better
                for old in checkpoints_to_remove(checkpoints_in(self._root), keeping.keep, keeping.keep_every):
                    _remove(old)
        except OSError as error:
            return str(error)
        return ""

    @contextmanager
    def _describe_errors(self) -> Iterator[None]:
        """Turn errors of writing into a TrainingError that says how to resume."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
            assert self._pending is not None
            step, temporary = self._pending
            if self._is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            saved = checkpoints_in(self._root)
            restart = (
                f"The earlier checkpoints are intact; the same command resumes from {saved[-1].name}"
                if saved
                else "There is no earlier checkpoint; the same command starts from step 1"
            )
            raise TrainingError(
                f"run_dir={self._cfg.run_dir}: step {step} can't be saved ({_reason(error)}). {restart}, once the disk"
                " has space (checkpoint.keep=N keeps fewer checkpoints) and the folder can be written"
            ) from error


def lacks_room_for_copies(chunks: list[Any]) -> bool:
    """Return whether host memory lacks room for ranks' optimizer state copies.

    Each rank has one copy, of 12 bytes per parameter, and needs the same again while writing.
    """
    parameters = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    needed = 2 * 12 * parameters * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return needed > psutil.virtual_memory().available


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint, renaming it first.

    A half-removed checkpoint would look damaged. The next run removes what is left under the temporary name.
    """
    hidden = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(4)}.partial")
    with suppress(FileNotFoundError):
        shutil.rmtree(checkpoint.rename(hidden), ignore_errors=True)


def checkpoints_to_remove(checkpoints: list[Path], keep: int | None, keep_every: int | None) -> list[Path]:
    """List the checkpoints to remove.

    These are neither among the last `keep` nor at multiples of `keep_every` steps.

    Args:
        checkpoints: oldest first.
    """
    if keep is None:
        return []
    return [path for path in checkpoints[:-keep] if keep_every is None or step_of(path) % keep_every]


def _reason(error: BaseException) -> str:
    """First line of an error, and the rank that raised it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return message_line(error)


def load(cfg: PretrainConfig, state: TrainingState, checkpoint: Path, rng_ranks: list[int] | None) -> None:
    """Load a checkpoint into the training state.

    Restores model, optimizer, learning-rate schedule and this rank's random number generators; only the model where
    `loads_weights_alone`.

    Args:
        rng_ranks: [tp, pp] of the run whose generators the checkpoint holds; with others, generators stay as they are.

    Raises:
        ConfigError: the checkpoint is damaged, or holds shifted fp32 weights.
    """
    entries = readable_entries(checkpoint, "checkpoint.resume")
    weights_only = loads_weights_alone(cfg, checkpoint)
    initial: dict[str, dict[str, Any]] = {}
    if weights_only:
        wanted = _sharded_model(state, sharding_metadata())
        initial = leave_out_missing(wanted, state.chunks, entries)
    else:
        wanted = sharded_state(state, sharding_metadata(), is_loading=True)
    if has_rng := rng_ranks == current_rng_ranks():
        wanted["rng"] = sharded_rng()
    is_in_run_dir = is_own(checkpoint, cfg.run_dir)
    try:
        loaded = load_shards(wanted, checkpoint, "checkpoint.resume", entries)
    except ConfigError as error:
        if is_in_run_dir:  # lets the next run start from an earlier checkpoint
            record_failed_load(checkpoint, error.problem)
        raise
    if is_in_run_dir and torch.distributed.get_rank() == 0:
        clear_failed_load(checkpoint)
    for chunk, name in zip(state.chunks, _chunk_names(state.chunks), strict=True):
        unwrap(chunk).load_state_dict(loaded[name] | initial.get(name, {}))
    if weights_only:
        state.optimizer.reload_model_params()  # updates its fp32 copies
        return
    if any(max_over_ranks(has_shifted_weights(state.optimizer, loaded["optimizer"]))):
        problem = "its fp32 weights are not those of its model: an earlier version of s2train saved them shifted"
        remedy = (
            f"In another run_dir, take the weights alone: {shell_setting('checkpoint.resume', checkpoint)}"
            " checkpoint.weights_only=true"
        )
        raise ConfigError("checkpoint.resume", checkpoint, problem, remedy)
    _set_hyperparameters(cfg.optim, loaded["optimizer"])
    convert_param_groups(state.optimizer, loaded["optimizer"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(state.optimizer)
    count_steps_in_parts(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])
    if has_rng:
        set_rng(loaded["rng"])


def _set_hyperparameters(optim: OptimConfig, loaded: Any) -> None:
    """Set the run's learning rates and hyperparameters in a loaded optimizer state.

    Call it before Megatron loads the state: 0.19 distinguishes parameter groups by their learning rates.
    """
    for group in param_groups_in(loaded):
        group.update(max_lr=optim.lr, min_lr=optim.lowest_lr)
        if {"betas", "eps"} <= group.keys():  # only Adam's
            group.update(betas=(optim.beta1, optim.beta2), eps=optim.eps)
        if optim.name == "sgd" and "momentum" in group:
            group["momentum"] = optim.options.get("sgd_momentum", OptimizerConfig.sgd_momentum)


def _chunk_names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _sharded_model(state: TrainingState, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(_chunk_names(state.chunks), state.chunks, strict=True)
    }


def sharded_state(state: TrainingState, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """Sharded state dict of model and optimizer, to save or to load."""
    names = _chunk_names(state.chunks)
    model = _sharded_model(state, metadata)
    optimizer = state.optimizer.sharded_state_dict(
        model["model"] if len(names) == 1 else model, is_loading=is_loading, metadata=metadata
    )
    return {**model, "optimizer": optimizer}
