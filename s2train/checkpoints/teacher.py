"""Finds, checks and loads the teacher of a run."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from s2train.attention.hybrid import HybridLayout
from s2train.attention.teacher import TeacherSetting, teacher_setting
from s2train.checkpoints.folders import find_checkpoint, read_config, remedy_for_damage
from s2train.checkpoints.integrity import damage
from s2train.checkpoints.setting_changes import changes_between
from s2train.checkpoints.shards import load_shards, sharding_metadata
from s2train.config import PretrainConfig
from s2train.data.tokenizers import Tokenizer, fingerprint
from s2train.errors import ConfigError, as_typed
from s2train.megatron.layer_backends import Backend
from s2train.megatron.teacher import Teacher, build_teacher
from s2train.planning import hybrid_layout

_MAY_DIFFER = {"model.name", "model.init_std"}


def find_teacher(cfg: PretrainConfig, tokenizer: Tokenizer) -> Path | None:
    """Find the checkpoint of the run's teacher; only reads files.

    Returns:
        None for a run without a teacher.
    Raises:
        ConfigError: there is no checkpoint, or it is damaged; it isn't dense; its model or tokenizer is another one.
    """
    if (named := teacher_setting(hybrid_layout(cfg).layers)) is None:
        return None
    checkpoint = find_checkpoint(named.value, named.setting)
    trained = read_config(checkpoint, named.setting)
    if not all(layer.is_dense for layer in hybrid_layout(trained).layers):
        problem = f"{checkpoint} isn't dense: its layout.layers is {trained.layout.layers}"
        raise ConfigError(named.setting, named.value, problem, "Name a dense model's run")
    for change in changes_between(trained, cfg):
        if change.setting.startswith("model.") and change.setting not in _MAY_DIFFER:
            problem = (
                f"{checkpoint} has {change.setting}={as_typed(change.before)}, and this run has {as_typed(change.now)}"
            )
            raise ConfigError(named.setting, named.value, problem, "Name a run of a model with the same shape and RoPE")
    _check_tokenizer(named, checkpoint, trained.data.tokenizer, tokenizer)
    if broken := damage(checkpoint):
        raise ConfigError(named.setting, checkpoint, broken, remedy_for_damage(checkpoint, named.setting))
    return checkpoint


def _check_tokenizer(named: TeacherSetting, checkpoint: Path, name: str, tokenizer: Tokenizer) -> None:
    """Check that the teacher was trained on this tokenizer's ids."""
    if (found := fingerprint(name)) == tokenizer.fingerprint:
        return
    problem = f"{checkpoint} was trained with the tokenizer {name}, and this run has {tokenizer.name}"
    if found is None:
        problem = f"{problem}; {name} is missing, so they can't be compared"
    remedy = "Name a run with the same tokenizer" if found else "Restore that file, or name a run with this tokenizer"
    raise ConfigError(named.setting, named.value, problem, remedy)


def with_teacher(cfg: PretrainConfig, checkpoint: Path | None) -> PretrainConfig:
    """Name the teacher's checkpoint in place of its run folder.

    A resumed run then learns from the same weights, though the teacher's run has gone on.

    Args:
        checkpoint: None: the run has no teacher, and its settings stay as they are.
    """
    named = teacher_setting(hybrid_layout(cfg).layers)
    if named is None or checkpoint is None:
        return cfg
    kinds = {
        letter: {**given, "teacher": str(checkpoint)} if given.get("teacher") == named.value else given
        for letter, given in cfg.layout.kinds.items()
    }
    return replace(cfg, layout=replace(cfg.layout, kinds=kinds))


def load_teacher(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    backend: Backend,
    device: torch.device,
    chunks: Iterable[torch.nn.Module],
) -> Teacher:
    """Build the teacher of the student `chunks`, and load its weights.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    named = teacher_setting(hybrid.layers)
    assert named is not None
    model = build_teacher(cfg, hybrid, backend, device)
    state = {"model": model.sharded_state_dict(metadata=sharding_metadata())}
    model.load_state_dict(load_shards(state, Path(named.value), named.setting)["model"])
    return Teacher(model, chunks)
