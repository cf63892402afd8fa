"""Compares a run's settings with its checkpoint's, and checks which may differ."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from s2train.attention.registry import kind_values
from s2train.config import PretrainConfig, head_dim, settings_by_name
from s2train.errors import ConfigError, as_typed
from s2train.layouts.patterns.registry import read_pattern, with_defaults
from s2train.rope_scaling import with_defaults as scaling_with_defaults
from s2train.validation.token_budgets import length

ALLOW_CHANGES = "checkpoint.allow_changes"
_SECOND_WARMUP = "optim.trunk_warmup_steps"
_SCHEDULE = "learning-rate schedule"

# Settings and sections that change neither what is trained nor what is measured.
_WITHOUT_EFFECT = (
    "checkpoint",
    "data.cache",
    "data.end_token",  # recorded in the data, which are compared
    "data.num_workers",  # workers take turns, so that samples keep their order
    "data.warn_epochs",
    "model.name",
    "plan",
    "run_dir",
    "tracking",
    "train.timeout_minutes",
)
# Settings and sections that determine where, how fast or how often something is done, but not what is trained.
# Any other setting changes the experiment.
KEEP_THE_EXPERIMENT = (
    *_WITHOUT_EFFECT,
    "attention_backend",
    "data.num_samples",  # a resumed run keeps the checkpoint's
    "data.tokenizer",  # a path; `check_data` compares tokenizers
    "data.valid_path",
    "dense_attention",
    "elementwise",
    "evaluation",
    "layer_backend",
    "loss",
    "optim.decay_tokens",  # the steps that follow from it are compared; and of the other tokens below
    "optim.warmup_tokens",
    "optim.wsd_decay_tokens",
    "parallel",
    "profile",
    "train.deterministic",
    "train.exit_step",
    "train.max_skipped_steps",
    "train.micro_batch_size",
    "train.recompute",
    "train.recompute_num_layers",
    "train.spike_factor",
    "train.steps",  # optim.decay_steps, which follows from it, is compared too
    "train.tokens",
)


def changes_results(setting: str) -> bool:
    """Whether a setting may change a run's results: losses, times or memory."""
    return not _is_among(setting, _WITHOUT_EFFECT)


def _is_among(setting: str, names: Collection[str]) -> bool:
    """Whether names list a setting or its section."""
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


@dataclass(frozen=True)
class Change:
    """A setting that differs from the checkpoint's.

    As text: `optim.lr 0.003 → 0.001`.
    """

    setting: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.setting} {as_typed(self.before)} → {as_typed(self.now)}"

    @property
    def is_of_the_experiment(self) -> bool:
        """Whether it changes what is trained."""
        return not _is_among(self.setting, KEEP_THE_EXPERIMENT)


def changes_between(before: PretrainConfig, now: PretrainConfig) -> list[Change]:
    """List the settings that differ.

    A setting left to its default equals one set to it.
    """
    # Through JSON, which turns tuples into lists.
    old, new = (dict(settings_by_name(json.loads(json.dumps(asdict(with_values(cfg)))))) for cfg in (before, now))
    if math.isclose(now.optim.lowest_lr * before.optim.lr, before.optim.lowest_lr * now.optim.lr, rel_tol=1e-9):
        new["optim.min_lr"] = old["optim.min_lr"]  # derived from optim.lr, which is listed
    return [
        Change(name, old.get(name), new.get(name))
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name) and name != ALLOW_CHANGES
    ]


def check_allowed(cfg: PretrainConfig, checkpoint: Path, changes: list[Change]) -> None:
    """Check that `checkpoint.allow_changes` names all changes of the experiment.

    Raises:
        ConfigError: some changes are not allowed; it names all of them, and the setting that allows them.
    """
    is_allowed = allowed_changes(cfg)
    asked = [change for change in changes if change.is_of_the_experiment and not is_allowed(change.setting)]
    if not asked:
        return
    named = ",".join(dict.fromkeys([*_allowed_names(cfg), *(change.setting for change in asked)]))
    problem = f"{checkpoint} was trained with other settings: {', '.join(map(str, asked))}"
    kept = next((c.before for c in asked if c.setting == "optim.decay_steps" and not cfg.optim.decay_steps), None)
    keep = "" if kept is None else f"optim.decay_steps={kept} keeps the {_SCHEDULE} (left unset, it is train.steps). "
    if any(c.setting == _SECOND_WARMUP and c.before == 0 for c in asked) and cfg.optim.trunk_warmup_steps is None:
        keep += f"{_SECOND_WARMUP}=0 keeps the {_SCHEDULE} of earlier versions. "
    remedy = (
        f"{keep}To resume with the new settings, set {ALLOW_CHANGES}=true or "
        f"'{ALLOW_CHANGES}=[{named}]'; for another experiment, set another run_dir"
    )
    first = asked[0].setting
    if first == "optim.decay_steps" and kept is not None:  # not set: name the setting that it follows from
        found = length(cfg, "train.steps")
        raise ConfigError(found.setting, found.value, problem, remedy)
    raise ConfigError(first, asked[0].now, problem, remedy)


def allowed_changes(cfg: PretrainConfig) -> Callable[[str], bool]:
    """Make the check whether `checkpoint.allow_changes` names a setting, or allows any.

    Naming the run's length also allows the decay that follows from it.
    """
    names = set(_allowed_names(cfg))
    if not cfg.optim.decay_steps and names & {"train.steps", "train.tokens"}:
        names.add("optim.decay_steps")
    return lambda setting: cfg.checkpoint.allow_changes is True or setting in names


def _allowed_names(cfg: PretrainConfig) -> Collection[str]:
    allowed = cfg.checkpoint.allow_changes
    return [allowed] if isinstance(allowed, str) else [] if isinstance(allowed, bool) else allowed


def with_values(cfg: PretrainConfig) -> PretrainConfig:
    """Fill in default values and values that follow from other settings."""
    layout, optim = cfg.layout, cfg.optim
    patterns = {
        letter: with_defaults(read_pattern(given, f"layout.patterns.{letter}"))
        for letter, given in layout.patterns.items()
    }
    # A constant learning rate has no decay.
    decay_steps = optim.decay_steps or (None if optim.decay_style == "constant" else cfg.train.steps)
    return replace(
        cfg,
        model=replace(
            cfg.model, head_dim=head_dim(cfg.model), rope_scaling=scaling_with_defaults(cfg.model.rope_scaling)
        ),
        layout=replace(layout, pattern=with_defaults(layout.pattern), patterns=patterns, kinds=kind_values(layout)),
        optim=replace(
            optim,
            decay_steps=decay_steps,
            min_lr=optim.lowest_lr,
            min_lr_ratio=None,
            trunk_warmup_steps=optim.second_warmup_steps if cfg.train.freeze_trunk_steps else None,
        ),
        evaluation=replace(cfg.evaluation, seed=cfg.held_out_seed),
    )
