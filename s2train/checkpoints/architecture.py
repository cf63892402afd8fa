"""Compares a run's architecture with its checkpoint's."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path

from s2train.attention.registry import kinds_of
from s2train.checkpoints.setting_changes import ALLOW_CHANGES, Change, allowed_changes
from s2train.config import PretrainConfig
from s2train.errors import ConfigError, as_typed
from s2train.rope_scaling import RopeScalingConfig

# Sections that determine the shards: a run must have the same values as the checkpoint that it loads.
_ARCHITECTURE = ("model", "layout", "schedule")
_NOT_IN_SHARDS = {"model.name", "model.init_std"}
# For longer sequences: a higher base (arXiv 2309.16039, section 2.1), or scaled frequencies. No shard depends on them.
_SCALING = {f"model.rope_scaling.{one.name}" for one in fields(RopeScalingConfig)}
_ROPE = {"model.rotary_base", *_SCALING}
_LAYOUT = ("layout", "schedule")  # sections that a new phase may change where it is allowed
_TAKE_WEIGHTS = "take the weights alone with checkpoint.weights_only=true"


def settings_that_may_change(cfg: PretrainConfig, *, weights_only: bool) -> set[str]:
    """Return settings of kinds of attention that may change on resume.

    A run that takes only weights may also change RoPE: by `checkpoint.weights_only`, or where
    `checkpoint.allow_changes` names it.
    """
    kinds = kinds_of(cfg.layout)
    found = {f"layout.kinds.{letter}.{name}" for letter in cfg.layout.kinds for name in kinds[letter].may_change}
    if not weights_only:
        return found
    return found | set(_ROPE if cfg.checkpoint.weights_only else filter(allowed_changes(cfg), _ROPE))


def changes_of_rope(changes: Iterable[Change]) -> list[Change]:
    """Select the changes of how positions are rotated."""
    return [change for change in changes if change.setting in _ROPE]


def is_same_layout(changes: Iterable[Change]) -> bool:
    """Return whether no setting of the layout changes."""
    return not any(change.setting.partition(".")[0] in _LAYOUT for change in changes)


def _is_without_weights(name: str) -> bool:
    """Return whether no weight depends on this setting of the layout.

    Kinds of attention may have weights.
    """
    return name.partition(".")[0] in _LAYOUT and not name.startswith("layout.kinds.")


def _other_layout(changed: Iterable[str]) -> str:
    """Format the remedy that allows all changes of a new phase's layout.

    Empty if one of them can't be allowed.
    """
    names = [name for name in changed if name.partition(".")[0] in _LAYOUT]
    if not all(map(_is_without_weights, names)):
        return ""
    return f", or '{ALLOW_CHANGES}=[{','.join(names)}]' for attention of another layout in this phase"


def check_same_architecture(
    changes: list[Change],
    checkpoint: Path,
    *,
    may_change: Collection[str] = (),
    weights_only: bool = False,
    allowed: Callable[[str], bool] | None = None,
    is_in_run_dir: bool = True,
) -> None:
    """Check that no change alters the checkpoint's architecture.

    Args:
        may_change: settings that may differ: of kinds of attention that their weights do not depend on, or of RoPE.
        allowed: in a new phase, whether `checkpoint.allow_changes` names a setting. A setting of the layout that it
            names may differ, since dense and S2 attention have no weights. None: no new phase.
        is_in_run_dir: whether the checkpoint is of the run's own folder, for the remedy.
    Raises:
        ConfigError: a setting of the architecture or the optimizer's sharding differs.
    """
    may_differ = _NOT_IN_SHARDS | set(may_change) | (set() if allowed is None else _ROPE)
    parts = ("model",) if weights_only else _ARCHITECTURE
    for change in changes:
        name = change.setting
        section = name.partition(".")[0]
        if allowed is not None and _is_without_weights(name) and allowed(name):
            continue
        if section in parts and name not in may_differ:
            problem = f"{checkpoint} was trained with {name}={as_typed(change.before)}"
            phase = ""
            if name in _ROPE:
                phase = ", or checkpoint.new_data=true for a new phase, or checkpoint.weights_only=true"
            if name in _ROPE and weights_only:
                names = ",".join(one.setting for one in changes_of_rope(changes))
                phase = f", or '{ALLOW_CHANGES}=[{names}]' to rotate positions otherwise"
            if allowed is not None and section in _LAYOUT:
                phase = _other_layout(change.setting for change in changes if change.setting not in may_differ)
            other = "start in another run_dir"
            if not is_in_run_dir:
                is_in_model = weights_only or section == "model"
                other = "start from step 1 with checkpoint.resume=auto" if is_in_model else _TAKE_WEIGHTS
            raise ConfigError(name, change.now, problem, f"Set that value, or {other}{phase}")
        if name in ("parallel.distributed_optimizer", "optim.name") and not weights_only:
            problem = f"{checkpoint} holds optimizer state saved with {name}={as_typed(change.before)}"
            raise ConfigError(name, change.now, problem, f"Set {name}={as_typed(change.before)}")
