"""Checkpoints on disk, in Megatron's folder names, and the model in one.

    RUN_DIR/checkpoints/iter_0000100/                         Megatron's shards
    RUN_DIR/checkpoints/iter_0000100/config.yaml              settings of the run that wrote them
    RUN_DIR/checkpoints/iter_0000100/progress.json            how far it was
    RUN_DIR/checkpoints/latest_checkpointed_iteration.txt     for Megatron's own tools

A folder `iter_*` was whole once: it is written under another name and renamed.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.checkpoint.api import CheckpointException
from yaml import YAMLError  # type: ignore[import-untyped]

from s2train.checkpoints.integrity import CONFIG, PROGRESS, damage, doubt
from s2train.checkpoints.optimizer_state_conversion import load_without_foreign_extra_state
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.planning import hybrid_layout


@dataclass(frozen=True)
class Progress:
    """How far a run was when it saved.

    Attributes:
        step: steps done.
        consumed_samples: of the data order that `order` tells; the next batch begins there.
        order: what fixes the data order, setting by setting.
        wandb_id: of its wandb run, None without.
        losses: of the steps since the last report, which the next report's mean takes in.
        health: `s2train.training.loss_spikes.Health`, field by field.
        rng_ranks: [tp, pp] of the run, whose ranks' random generators the shards hold; None: they hold none.
        first_step: at which the data order began: 0, but in a new phase on other data.
        weights_only: there is no optimizer and no schedule in it; a run starts from it at step 0, in any layout.
    """

    step: int
    consumed_samples: int
    order: dict[str, Any]
    wandb_id: str | None
    losses: list[float] = field(default_factory=list)
    health: dict[str, Any] = field(default_factory=dict)
    rng_ranks: list[int] | None = None
    first_step: int = 0
    weights_only: bool = False

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def folder_name(step: int) -> str:
    """Megatron's name of the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """That its name tells."""
    return int(checkpoint.name[5:])


def checkpoints_in(root: Path) -> list[Path]:
    """The checkpoints of a `checkpoints` folder, damaged or not, oldest first; none where there is no such folder."""
    found = [path for path in root.glob("iter_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def own_checkpoints(run_dir: str) -> Path:
    """The folder that a run keeps its checkpoints in."""
    return Path(run_dir) / "checkpoints"


def is_own(checkpoint: Path, run_dir: str) -> bool:
    """Whether a checkpoint lies in a run's own folder."""
    return checkpoint.parent.resolve() == own_checkpoints(run_dir).resolve()


def find_checkpoint(where: str | Path, setting: str = "checkpoint") -> Path:
    """The checkpoint that `where` means: the last one of a run folder or a `checkpoints` folder, or one itself.

    Raises:
        ConfigError: there is none.
    """
    path = Path(where)
    if path in checkpoints_in(path.parent):
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        raise ConfigError(setting, where, "no checkpoint there", "Give a run folder or one of its checkpoints/iter_*")
    return found[-1]


def read_progress(checkpoint: Path, setting: str = "checkpoint") -> Progress:
    """How far the run was that wrote a checkpoint, which `setting` names.

    Raises:
        ConfigError: the file is missing or unreadable, or of another version.
    """
    try:
        return Progress(**json.loads((checkpoint / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(setting, checkpoint, PROGRESS, error) from error


def read_config(checkpoint: Path, setting: str = "checkpoint") -> PretrainConfig:
    """The configuration of the run that wrote a checkpoint, which `setting` names.

    Raises:
        ConfigError: it is missing or unreadable, or not a configuration of this version.
    """
    try:
        saved = OmegaConf.load(checkpoint / CONFIG)
        if isinstance(saved, DictConfig) and not OmegaConf.is_dict(saved.get("plan", {})):
            del saved["plan"]  # of a version whose plan was true or false; a run that trains has false
        merged = OmegaConf.merge(OmegaConf.structured(PretrainConfig), saved)
        config = OmegaConf.to_object(merged)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(setting, checkpoint, CONFIG, error) from error
    assert isinstance(config, PretrainConfig)
    return config


def _unreadable(setting: str, checkpoint: Path, name: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    another = "Another version of s2train wrote it: use that one, or name another checkpoint"
    remedy = older_instead(checkpoint, setting) if damage(checkpoint) else another
    return ConfigError(setting, checkpoint, f"its {name} can't be read ({reason})", remedy)


def write_config(cfg: PretrainConfig, path: Path) -> None:
    """Write a run's configuration as YAML."""
    OmegaConf.save(OmegaConf.structured(cfg), path)


def load_shards(state: dict[str, Any], checkpoint: Path, setting: str = "checkpoint") -> dict[str, Any]:
    """Megatron's loading of a sharded state dict.

    Raises:
        ConfigError: the checkpoint's shards are damaged.
    """
    try:
        return load_without_foreign_extra_state(state, str(checkpoint))
    except (Exception, CheckpointException) as error:  # many kinds for a missing or truncated file
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        problem = f"its shards can't be loaded ({reason})"
        raise ConfigError(setting, checkpoint, problem, older_instead(checkpoint, setting)) from error


def older_instead(checkpoint: Path, setting: str = "checkpoint") -> str:
    """The remedy for a damaged checkpoint, named by `setting`: the newest whole one before it."""
    older = [path for path in checkpoints_in(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    whole = next((path for path in reversed(older) if doubt(path) is None), None)
    if whole is not None:
        return f"The last one before it that is whole: {setting}={whole}"
    start = "start in another run_dir, or anew in this one (damaged ones stay, renamed): checkpoint.resume=never"
    return f"There is no older one there that is whole; {start if setting == 'checkpoint.resume' else 'name another'}"


def sharding_metadata() -> dict[str, Any]:
    """How shards are laid out: such that any other number of ranks can load them."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }


@dataclass
class Loaded:
    """A trained model, ready to evaluate."""

    config: PretrainConfig
    model: MegatronModule
    step: int
    path: Path


def load_for_inference(
    checkpoint: str | Path,
    device: torch.device,
    tp: int = 1,
    attention_backend: str = "auto",
    backend: str | None = None,
) -> Loaded:
    """The model of a checkpoint in eval mode, whole on each tensor parallel group, without its optimizer.

    Call after `s2train.megatron.setup.initialize` with this tp. The model takes (tokens [b, s] int64,
    position_ids [b, s] int64, None) and gives logits [b, s, vocab].

    Args:
        backend: of the layers around attention; None: as the run's, transformer-engine only where it works.
    Raises:
        ConfigError: no checkpoint there, or a damaged one.
    """
    path = find_checkpoint(checkpoint)
    cfg = read_config(path)
    cfg.attention_backend = attention_backend
    cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.vpp, cfg.parallel.cp = tp, 1, None, 1
    cfg.parallel.sequence_parallel = False
    cfg.train.recompute = "none"
    # Any backend reads another's weights, and answers in the run's precision.
    cfg.backend, cfg.fp8 = backend or ("local" if cfg.backend == "local" else "auto"), "none"
    # The run's kernels may not be installed here, nor serve later queries; there is no loss.
    cfg.dense_attention, cfg.elementwise, cfg.loss = "auto", "auto", "torch"
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid_layout(cfg), backend_of(cfg), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False  # gathers the logits over tensor parallel ranks
    gpt.output_layer.gather_output = True
    gpt.load_state_dict(load_shards({"model": gpt.sharded_state_dict(metadata=sharding_metadata())}, path)["model"])
    chunk.eval()
    return Loaded(config=cfg, model=chunk, step=read_progress(path).step, path=path)
