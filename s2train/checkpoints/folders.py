"""Finds checkpoints on disk, reads them, and loads their models.

    RUN_DIR/checkpoints/iter_0000100/                         Megatron's shards
    RUN_DIR/checkpoints/iter_0000100/config.yaml              settings of the run that wrote them
    RUN_DIR/checkpoints/iter_0000100/progress.json            progress of that run
    RUN_DIR/checkpoints/latest_checkpointed_iteration.txt     for Megatron's own tools

Folder names are Megatron's. A folder `iter_*` was complete once: it is written under another name and then renamed.
"""

import json
from collections.abc import Collection
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

from s2train.attention.hybrid import HybridLayout
from s2train.checkpoints.integrity import CONFIG, PROGRESS, damage, known_problem, later_megatron, later_torch
from s2train.checkpoints.masks import check_masks, mask_digests
from s2train.checkpoints.optimizer_state_conversion import load_without_foreign_extra_state
from s2train.checkpoints.shard_index import saved_entries
from s2train.command_line.old_names import rename_saved
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.megatron.core_attention import cores_of
from s2train.megatron.layer_backends import backend_of
from s2train.megatron.model import build_model, transformer_config, unwrap
from s2train.planning import hybrid_layout


@dataclass(frozen=True)
class Progress:
    """Progress of a run when it saved.

    Attributes:
        step: steps done.
        consumed_samples: samples consumed of the data order `order`; the next batch begins there.
        order: what determines the data order, by setting.
        wandb_id: ID of its wandb run; None without wandb.
        losses: losses of the steps since the last report, which the next report's mean includes.
        auxiliary: auxiliary losses of the same steps, by column and layer.
        health: fields of `s2train.training.loss_spikes.LossHistory`; the name is that of saved checkpoints.
        rng_ranks: [tp, pp] of the run whose random number generators the shards hold; None: they hold none.
        first_step: step at which the data order began: 0, except in a new phase on other data.
        weights_only: the checkpoint has no optimizer state and no learning-rate schedule; a run starts from it at step
            0, in any layout.
        masks: digests of the masks that its layout reads, by file; earlier checkpoints have none.
        tokenizer: fingerprint of the tokenizer of its data; None: not recorded.
        decays_gains: whether weight decay applies to the gains of kinds of attention (`Weight.is_gain`). It did in
            earlier versions, and the runs that they began keep it: their parameter groups are saved.
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
    auxiliary: dict[str, list[float]] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    decays_gains: bool = True

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def folder_name(step: int) -> str:
    """Megatron's folder name for the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """Step in a checkpoint's folder name."""
    return int(checkpoint.name[5:])


def checkpoints_in(root: Path) -> list[Path]:
    """List the checkpoints in a `checkpoints` folder, damaged or not, oldest first.

    The list is empty if the folder does not exist.
    """
    found = [path for path in root.glob("iter_*") if path.name[5:].isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def own_checkpoints(run_dir: str) -> Path:
    """Folder in which a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def is_own(checkpoint: Path, run_dir: str) -> bool:
    """Whether a checkpoint is in a run's own folder."""
    return checkpoint.parent.resolve() == own_checkpoints(run_dir).resolve()


def find_checkpoint(where: str | Path, setting: str = "checkpoint") -> Path:
    """Find the checkpoint that a path names.

    Args:
        where: a checkpoint, or a run folder or `checkpoints` folder, which names its last checkpoint.
        setting: setting to name in an error.
    Raises:
        ConfigError: there is none.
    """
    path = Path(where)
    if path in checkpoints_in(path.parent):
        return path
    found = checkpoints_in(path / "checkpoints") or checkpoints_in(path)
    if not found:
        remedy = "Give a run folder or one of its checkpoints/iter_*"
        if any(path.glob("*.safetensors")):
            remedy = f"Import it: python launch/import.py weights={where} output=…, and give that output"
        raise ConfigError(setting, where, "no checkpoint there", remedy)
    return found[-1]


def read_progress(checkpoint: Path, setting: str = "checkpoint") -> Progress:
    """Read the progress of the run that wrote a checkpoint.

    Args:
        setting: setting to name in an error.
    Raises:
        ConfigError: the file is missing or unreadable, or another version of s2train wrote it.
    """
    try:
        return Progress(**json.loads((checkpoint / PROGRESS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(setting, checkpoint, PROGRESS, error) from error


def read_config(checkpoint: Path, setting: str = "checkpoint") -> PretrainConfig:
    """Read the configuration of the run that wrote a checkpoint.

    Args:
        setting: setting to name in an error.
    Raises:
        ConfigError: the file is missing or unreadable, or another version of s2train wrote it.
    """
    try:
        saved = OmegaConf.load(checkpoint / CONFIG)
        if isinstance(saved, DictConfig) and not OmegaConf.is_dict(saved.get("plan", {})):
            del saved["plan"]  # in an earlier version plan was a bool, and false in every training run
        if OmegaConf.select(saved, "parallel.tp_comm_chunks") is not None:
            del saved.parallel.tp_comm_chunks  # an earlier version's, which changed speed alone
        settings: Any = OmegaConf.to_container(saved)
        rename_saved(settings)
        defaults = OmegaConf.structured(PretrainConfig)
        defaults.optim.trunk_warmup_steps = 0  # earlier versions, which don't write it, had no such warm-up
        defaults.evaluation.seed = OmegaConf.select(saved, "seed", default=defaults.seed)  # they had no other
        merged = OmegaConf.merge(defaults, settings)
        config = OmegaConf.to_object(merged)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(setting, checkpoint, CONFIG, error) from error
    assert isinstance(config, PretrainConfig)
    return config


def _unreadable(setting: str, checkpoint: Path, name: str, error: Exception) -> ConfigError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    another = "Another version of s2train wrote it: use that version, or set another checkpoint"
    remedy = remedy_for_damage(checkpoint, setting) if damage(checkpoint) else another
    return ConfigError(setting, checkpoint, f"its {name} can't be read ({reason})", remedy)


def write_config(cfg: PretrainConfig, path: Path) -> None:
    """Write a run's configuration as YAML."""
    # As plain values: OmegaConf would build and check a node for each, which takes far longer.
    OmegaConf.save(OmegaConf.create(asdict(cfg)), path)


def load_shards(
    state: dict[str, Any], checkpoint: Path, setting: str = "checkpoint", entries: Collection[str] | None = None
) -> dict[str, Any]:
    """Load a sharded state dict through Megatron.

    Args:
        entries: what `readable_entries` returned; None: not called yet.
    Raises:
        ConfigError: the checkpoint's shards are damaged, or a later torch or megatron-core wrote them.
    """
    known = readable_entries(checkpoint, setting) if entries is None else entries
    try:
        return load_without_foreign_extra_state(state, checkpoint, known)
    except (Exception, CheckpointException) as error:  # a missing or truncated file raises many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        problem = damage(checkpoint) or f"its shards can't be loaded ({reason})"
        raise ConfigError(setting, checkpoint, problem, remedy_for_damage(checkpoint, setting)) from error


def readable_entries(checkpoint: Path, setting: str = "checkpoint") -> set[str]:
    """Return the names of a checkpoint's saved tensors and objects.

    Raises:
        ConfigError: the index is damaged, or the installed torch or megatron-core can't read what a later one wrote.
    """
    try:
        entries = saved_entries(checkpoint)
        problem = later_megatron(checkpoint, entries)
    except Exception as error:  # unpickling damaged bytes can raise any exception
        if (problem := later_torch(error)) is None:
            reason = f"its index .metadata can't be read ({type(error).__name__})"
            raise ConfigError(setting, checkpoint, reason, remedy_for_damage(checkpoint, setting)) from error
    if problem is not None:
        remedy = (
            "Install that version; or, for the weights alone, run launch/export.py with that version and"
            " launch/import.py with this one"
        )
        raise ConfigError(setting, checkpoint, problem, remedy)
    return entries


def remedy_for_damage(checkpoint: Path, setting: str = "checkpoint") -> str:
    """Remedy for a damaged checkpoint: the newest intact one before it."""
    older = [path for path in checkpoints_in(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    intact = next((path for path in reversed(older) if known_problem(path) is None), None)
    if intact is not None:
        return f"Use the last intact checkpoint before it: {setting}={intact}"
    restart = (
        "start in another run_dir, or from step 1 in this one (damaged checkpoints are renamed and kept):"
        " checkpoint.resume=never"
    )
    return f"No older checkpoint there is intact; {restart if setting == 'checkpoint.resume' else 'set another one'}"


def sharding_metadata() -> dict[str, Any]:
    """Metadata of a shard layout that any number of ranks can load."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "distrib_optim_sharding_type": "fully_reshardable",
    }


@dataclass
class Loaded:
    """A trained model in eval mode, with its configuration."""

    config: PretrainConfig
    model: MegatronModule
    step: int
    path: Path


def load_for_inference(
    checkpoint: str | Path,
    device: torch.device,
    tp: int = 1,
    attention_backend: str = "auto",
    layer_backend: str | None = None,
    *,
    hybrid: HybridLayout | None = None,
    seq_length: int | None = None,
    precision: str | None = None,
    recompute: str = "none",
) -> Loaded:
    """Load the model of a checkpoint in eval mode, without its optimizer.

    Each tensor parallel group holds the whole model. Call after `s2train.megatron.setup.initialize` with this tp. The
    model takes (tokens [b, s] int64, position_ids [b, s] int64, None) and returns logits [b, s, vocab].

    Args:
        layer_backend: of the layers around attention; None takes the run's, transformer-engine only if it works.
        hybrid: attention of other kinds without weights, over the same heads; None: the run's.
        seq_length, precision: None: the run's.
        recompute: as in a run, for backward passes in train mode.
    Raises:
        ConfigError: there is no checkpoint, it is damaged, or it was trained with other masks than its files hold now.
    """
    path = find_checkpoint(checkpoint)
    cfg, progress = read_config(path), read_progress(path)
    if hybrid is None:
        hybrid = hybrid_layout(cfg)
        check_masks(progress.masks, mask_digests(hybrid), path, "checkpoint")
    cfg.attention_backend = attention_backend
    cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.vpp, cfg.parallel.cp = tp, 1, None, 1
    cfg.parallel.sequence_parallel = False
    cfg.train.recompute, cfg.train.recompute_num_layers = recompute, 1
    cfg.train.seq_length, cfg.train.precision = seq_length or cfg.train.seq_length, precision or cfg.train.precision
    # Any backend loads another's weights, and computes in the run's precision.
    cfg.layer_backend, cfg.fp8 = layer_backend or ("local" if cfg.layer_backend == "local" else "auto"), "none"
    # The run's kernels may not be installed here, or not support a query offset. No loss is computed.
    cfg.dense_attention, cfg.elementwise, cfg.loss = "auto", "auto", "torch"
    (chunk,) = build_model(cfg, transformer_config(cfg), hybrid, backend_of(cfg), device)
    gpt = unwrap(chunk)
    gpt.parallel_output = False  # gathers the logits over tensor parallel ranks
    gpt.output_layer.gather_output = True
    gpt.load_state_dict(load_shards({"model": gpt.sharded_state_dict(metadata=sharding_metadata())}, path)["model"])
    chunk.eval()
    for core in cores_of(gpt):
        core.step = progress.step  # that its random numbers depend on
    return Loaded(config=cfg, model=chunk, step=progress.step, path=path)
