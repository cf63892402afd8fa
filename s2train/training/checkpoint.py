"""Saving and loading all that a run needs to go on."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from s2train.config import OptimConfig, PretrainConfig
from s2train.errors import TrainingError
from s2train.files import replacing
from s2train.megatron.checkpoint import (
    CONFIG,
    PROGRESS,
    Progress,
    checkpoints_in,
    folder_name,
    load_shards,
    sharding_metadata,
    write_config,
)
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.exchange import fit_groups
from s2train.megatron.model import unwrap
from s2train.megatron.torch_adam import separate_steps


@dataclass
class TrainingState:
    """What the shards of a checkpoint hold."""

    chunks: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def save(cfg: PretrainConfig, state: TrainingState, progress: Progress) -> Path:
    """Save on all ranks together; returns the checkpoint's folder.

    Raises:
        TrainingError: the folder is there already: another job is at work in this run folder.
    """
    root = Path(cfg.run_dir) / "checkpoints"
    final, temporary = root / folder_name(progress.step), root / f".{folder_name(progress.step)}.partial"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    metadata = sharding_metadata()
    content = _sharded_state(state, metadata, is_loading=False)
    content["scheduler"] = state.scheduler.state_dict()
    save_checkpoint_shards(content, str(temporary), {k: v for k, v in metadata.items() if isinstance(v, str)})
    if is_first:
        write_config(cfg, temporary / CONFIG)
        progress.write(temporary / PROGRESS)
        if final.exists():
            raise TrainingError(f"{final} exists: is another job at work in {cfg.run_dir}? Kept {temporary}")
        temporary.rename(final)
        with replacing(root / "latest_checkpointed_iteration.txt") as latest:
            latest.write_text(str(progress.step))
        if cfg.checkpoint.keep is not None:
            for old in checkpoints_in(root)[: -cfg.checkpoint.keep]:
                shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def load(cfg: PretrainConfig, state: TrainingState, checkpoint: Path) -> None:
    """Load model, optimizer and schedule in place.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    loaded = load_shards(_sharded_state(state, sharding_metadata(), is_loading=True), checkpoint)
    for chunk, name in zip(state.chunks, _chunk_names(state.chunks), strict=True):
        unwrap(chunk).load_state_dict(loaded[name])
    _set_hyperparameters(cfg.optim, loaded["optimizer"])
    fit_groups(state.optimizer, loaded["optimizer"])
    state.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(state.optimizer)
    state.scheduler.load_state_dict(loaded["scheduler"])


def _set_hyperparameters(optim: OptimConfig, loaded: Any) -> None:
    """Put the command line's into a loaded optimizer state, in place of the checkpoint's.

    Before Megatron loads it: 0.19 tells parameter groups apart by their learning rates.
    """
    if isinstance(loaded, dict):
        for group in loaded.get("param_groups", []):
            group.update(max_lr=optim.lr, min_lr=optim.min_lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        for value in loaded.values():
            _set_hyperparameters(optim, value)
    elif isinstance(loaded, list | tuple):
        for value in loaded:
            _set_hyperparameters(optim, value)


def _chunk_names(chunks: list[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _sharded_state(state: TrainingState, metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    names = _chunk_names(state.chunks)
    model = {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, state.chunks, strict=True)
    }
    optimizer = state.optimizer.sharded_state_dict(
        model["model"] if len(names) == 1 else model, is_loading=is_loading, metadata=metadata
    )
    return {**model, "optimizer": optimizer}
