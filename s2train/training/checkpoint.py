"""Checkpoints through Megatron's dist_checkpointing, in Megatron's folder names.

    RUN_DIR/checkpoints/latest_checkpointed_iteration.txt     the last whole one
    RUN_DIR/checkpoints/iter_0000100/                         shards, and config.yaml of the run that wrote them

A checkpoint is written under a temporary name, renamed when whole, and only then named as the latest.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from omegaconf import OmegaConf

from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.megatron.backends import choose_backend
from s2train.megatron.compat import save_checkpoint_shards
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.megatron.torch_adam import separate_steps
from s2train.planning import hybrid_layout

_LATEST = "latest_checkpointed_iteration.txt"
_CONFIG = "config.yaml"
# What the shards depend on: these must agree between a checkpoint and the run that loads it.
_ARCHITECTURE = ("model", "layout", "schedule")


@dataclass
class TrainingState:
    """Everything that a checkpoint holds besides its configuration."""

    chunks: list[Any]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    wandb_id: str | None = None


def folder_name(step: int) -> str:
    """Megatron's name of the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(checkpoint.name.removeprefix("iter_"))


def find_checkpoint(where: str | Path, setting: str = "checkpoint") -> Path:
    """The checkpoint folder that `where` means: a run folder, its `checkpoints` folder, or one checkpoint.

    Raises:
        ConfigError: there is none.
    """
    path = Path(where)
    if path.name.startswith("iter_") and (path / _CONFIG).is_file():
        return path
    for root in (path / "checkpoints", path):
        if (root / _LATEST).is_file():
            found = root / folder_name(int((root / _LATEST).read_text()))
            if (found / _CONFIG).is_file():
                return found
            raise ConfigError(
                setting, where, f"{root / _LATEST} names {found}, which is not whole", "Name another iter_*"
            )
    raise ConfigError(setting, where, "no checkpoint there", "Give a run folder or one of its checkpoints/iter_*")


def read_config(checkpoint: Path) -> PretrainConfig:
    """The configuration of the run that wrote a checkpoint."""
    schema = OmegaConf.structured(PretrainConfig)
    merged = OmegaConf.merge(schema, OmegaConf.load(checkpoint / _CONFIG))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, PretrainConfig)
    return config


def write_config(cfg: PretrainConfig, path: Path) -> None:
    """Write a run's configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(cfg), path)


def check_same_architecture(cfg: PretrainConfig, checkpoint: Path, setting: str) -> None:
    """Refuse a checkpoint whose model or layout is another's.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    saved = OmegaConf.structured(read_config(checkpoint))
    now = OmegaConf.structured(cfg)
    for part in _ARCHITECTURE:
        for name in _flat_names(now[part]):
            old, new = OmegaConf.select(saved[part], name), OmegaConf.select(now[part], name)
            if old != new and (part, name) != ("model", "name"):
                raise ConfigError(
                    f"{part}.{name}",
                    new,
                    f"{checkpoint} was trained with {part}.{name}={old}",
                    f"Set it so, or choose another {setting}",
                )
    before, after = saved.parallel.distributed_optimizer, now.parallel.distributed_optimizer
    if before != after:
        raise ConfigError(
            "parallel.distributed_optimizer",
            after,
            f"{checkpoint} holds the optimizer's state of the other kind",
            f"Set parallel.distributed_optimizer={str(before).lower()}",
        )


def _flat_names(node: Any, prefix: str = "") -> list[str]:
    names = []
    for key in node:
        child = OmegaConf.select(node, key)
        names += _flat_names(child, f"{prefix}{key}.") if OmegaConf.is_dict(child) else [f"{prefix}{key}"]
    return names


def save(cfg: PretrainConfig, state: TrainingState, step: int) -> Path:
    """Save on all ranks together; returns the checkpoint's folder."""
    root = Path(cfg.run_dir) / "checkpoints"
    final, temporary = root / folder_name(step), root / f".{folder_name(step)}.partial"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    torch.distributed.barrier()
    metadata = _metadata()
    content = _sharded_state(state, metadata, is_loading=False)
    content |= {"iteration": step, "scheduler": state.scheduler.state_dict(), "wandb_id": state.wandb_id}
    save_checkpoint_shards(content, str(temporary), {k: v for k, v in metadata.items() if isinstance(v, str)})
    if is_first:
        write_config(cfg, temporary / _CONFIG)
        if final.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(final)
        temporary.rename(final)
        with replacing(root / _LATEST) as latest:
            latest.write_text(str(step))
        _drop_old(root, cfg.checkpoint.keep)
    torch.distributed.barrier()
    return final


def load(cfg: PretrainConfig, state: TrainingState, checkpoint: Path) -> int:
    """Load model, optimizer and schedule in place; returns the step to go on from."""
    metadata = _metadata()
    loaded = dist_checkpointing.load(_sharded_state(state, metadata, is_loading=True), str(checkpoint))
    for chunk, name in zip(state.chunks, _chunk_names(state.chunks), strict=True):
        unwrap(chunk).load_state_dict(loaded[name])
    state.optimizer.load_state_dict(loaded["optimizer"])
    separate_steps(state.optimizer)
    for group in state.optimizer.param_groups:
        # The schedule is the command line's, not the checkpoint's.
        group["max_lr"], group["min_lr"] = cfg.optim.lr, cfg.optim.min_lr
    state.scheduler.load_state_dict(loaded["scheduler"])
    state.wandb_id = loaded["wandb_id"]
    return int(loaded["iteration"])


@dataclass
class Loaded:
    """A trained model, ready to evaluate."""

    config: PretrainConfig
    model: GPTModel
    step: int
    path: Path


def load_for_inference(
    checkpoint: str | Path, device: torch.device, tp: int = 1, attention_backend: str = "auto"
) -> Loaded:
    """The model of a checkpoint in eval mode, whole on each tensor parallel group, without its optimizer.

    Call after `s2train.megatron.setup.initialize` with this tp. The model takes (tokens [b, s] int64,
    position_ids [b, s] int64, None) and gives logits [b, s, vocab].

    Raises:
        ConfigError: no checkpoint there.
    """
    path = find_checkpoint(checkpoint)
    cfg = read_config(path)
    cfg.attention_backend = attention_backend
    cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.vpp, cfg.parallel.cp = tp, 1, None, 1
    cfg.parallel.sequence_parallel = False
    cfg.train.recompute = "none"
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), choose_backend(cfg.backend), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False  # gathers the logits over tensor parallel ranks
    if hasattr(gpt, "output_layer"):
        gpt.output_layer.gather_output = True
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict(metadata=_metadata())}, str(path))
    gpt.load_state_dict(loaded["model"])
    chunk.eval()
    return Loaded(config=cfg, model=chunk, step=step_of(path), path=path)


def _metadata() -> dict[str, Any]:
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # Loads under any other number of ranks.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


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


def _drop_old(root: Path, keep: int | None) -> None:
    if keep is None:
        return
    for old in sorted(root.glob("iter_*"), key=step_of)[:-keep]:
        shutil.rmtree(old)
