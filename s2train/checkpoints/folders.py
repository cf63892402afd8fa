"""Finds checkpoints on disk, and reads their settings and progress.

    RUN_DIR/checkpoints/iter_0000100/                         Megatron's shards
    RUN_DIR/checkpoints/iter_0000100/config.yaml              settings of the run that wrote them
    RUN_DIR/checkpoints/iter_0000100/progress.json            progress of that run
    RUN_DIR/checkpoints/latest_checkpointed_iteration.txt     for Megatron's own tools

Folder names are Megatron's. A folder `iter_*` was complete once: it is written under another name and then renamed.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from s2train.checkpoints.integrity import CONFIG, PROGRESS, damage, known_problem
from s2train.checkpoints.listing import checkpoints_in, checkpoints_of, step_of
from s2train.command_line.commands import hydra_setting, python_command, shell_setting
from s2train.command_line.old_names import rename_saved
from s2train.command_line.overrides import without_interpolation
from s2train.config import PretrainConfig
from s2train.errors import ConfigError, message_line


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
        held_out: fingerprints of the datasets of `data.valid_path`; empty: it was not set; None: not recorded.
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
    held_out: list[str] | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


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
    found = checkpoints_of(path) or checkpoints_in(path)
    if not found:
        remedy = "Give a run folder or one of its checkpoints/iter_*"
        if any(path.glob("*.safetensors")):
            command = python_command("launch/import.py", hydra_setting("weights", where))
            remedy = f"Import it: {command} output=…, and give that output"
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
    another = "Another version of s2train wrote it: use that version, or set another checkpoint"
    remedy = remedy_for_damage(checkpoint, setting) if damage(checkpoint) else another
    return ConfigError(setting, checkpoint, f"its {name} can't be read ({message_line(error)})", remedy)


def write_config(cfg: PretrainConfig, path: Path) -> None:
    """Write a run's configuration as YAML."""
    OmegaConf.save(OmegaConf.create(written_settings(cfg)), path)


def written_settings(cfg: PretrainConfig) -> dict[str, Any]:
    """Return a run's settings as `write_config` writes them."""
    # As plain values: OmegaConf would build and check a node for each, which takes far longer.
    settings: dict[str, Any] = _as_written(asdict(cfg))
    return settings


def _as_written(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_written(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_written(each) for each in value]
    return without_interpolation(value) if isinstance(value, str) else value


def remedy_for_damage(checkpoint: Path, setting: str = "checkpoint") -> str:
    """Remedy for a damaged checkpoint: the newest intact one before it."""
    older = [path for path in checkpoints_in(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    intact = next((path for path in reversed(older) if known_problem(path) is None), None)
    if intact is not None:
        return f"Use the last intact checkpoint before it: {shell_setting(setting, intact)}"
    restart = (
        "start in another run_dir, or from step 1 in this one (damaged checkpoints are renamed and kept):"
        " checkpoint.resume=never"
    )
    return f"No older checkpoint there is intact; {restart if setting == 'checkpoint.resume' else 'set another one'}"
