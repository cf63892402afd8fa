"""Checks the values of settings, and settings that limit each other."""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from s2train.attention.registry import kinds_of
from s2train.config import CheckpointConfig, OptimConfig, PretrainConfig, TrackingConfig, settings_by_name
from s2train.errors import ConfigError
from s2train.layouts.schedules import find_schedule
from s2train.validation.token_budgets import length

_CHOICES: dict[str, tuple[str | int, ...]] = {
    "train.precision": ("bf16", "fp32"),
    "train.recompute": ("none", "selective", "mlp", "full"),
    "optim.name": ("adam", "sgd", "muon"),
    "optim.decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "schedule.placement": ("as_is", "balanced"),
    "parallel.cp_exchange": ("blocks", "overlapped", "gather", "auto"),
    "parallel.pipeline_split": ("even", "cost"),
    "tracking.wandb": ("auto", "disabled", "offline", "online"),
    "tracking.timing": (0, 1, 2),
    "tracking.x_axis": ("step", "consumed_tokens"),
    "layer_backend": ("auto", "local", "te"),
    "fp8": ("none", "hybrid", "e4m3"),
    "fp8_recipe": ("tensorwise", "blockwise", "mxfp8"),
    "dense_attention": ("auto", "fa4", "s2train", "cudnn", "flash", "efficient"),
    "elementwise": ("auto", "torch", "liger"),
    "loss": ("auto", "torch", "liger", "in_place", "linear"),
    "attention_backend": ("auto", "triton", "portable", "torch"),
}
_POSITIVE: dict[str, tuple[str, ...]] = {
    "model": (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "vocab_size",
        "rotary_base",
        "rotary_percent",
        "norm_epsilon",
        "init_std",
    ),
    "layout": ("block_size",),
    "data": ("num_samples", "warn_epochs"),
    "optim": ("lr", "eps", "decay_steps", "wsd_decay_steps"),
    "parallel": ("tp", "pp", "vpp", "cp"),
    "train": (
        "steps",
        "seq_length",
        "global_batch_size",
        "micro_batch_size",
        "recompute_num_layers",
        "exit_step",
        "spike_factor",
        "timeout_minutes",
    ),
    "checkpoint": ("interval", "keep", "keep_every"),
    "evaluation": ("batches",),
    "tracking": ("log_interval",),
    "plan": ("count", "gpus"),
}
_NOT_NEGATIVE: dict[str, tuple[str, ...]] = {
    "schedule": ("dense_heads",),
    "data": ("num_workers",),
    "train": ("max_skipped_steps", "freeze_trunk_steps"),
    "optim": ("min_lr_ratio", "min_lr", "weight_decay", "clip_grad", "warmup_steps", "trunk_warmup_steps"),
    "evaluation": ("interval",),
}
# Each layer, head and block is an object or an entry of a table in plans and layouts: a slip of ten digits takes hours.
_OF_LAYOUTS = "is larger than any layout that s2train builds"
_MOST: dict[str, tuple[int, str]] = {
    "model.num_layers": (4096, _OF_LAYOUTS),
    "model.num_attention_heads": (4096, _OF_LAYOUTS),
    "data.num_workers": (1024, "is more processes than a machine starts for each rank"),
    "train.timeout_minutes": (525_600, "is more than a year"),  # and no number that clocks overflow by
}
_MOST_BLOCKS = 1 << 17
_LARGEST_SEED = 2**32 - 1  # NumPy's, which Megatron shuffles with
_LONGEST_TAG = 64  # wandb's limit


def check_values(cfg: PretrainConfig) -> None:
    """Check that choices are known, and numbers finite and in range.

    Raises:
        ConfigError: on the first invalid setting.
    """
    for setting, value in _floats(cfg):
        if not math.isfinite(value):
            raise ConfigError(setting, value, "is not a finite number", f"Set {setting} to a finite number.")
    if not cfg.run_dir.strip():
        raise ConfigError("run_dir", cfg.run_dir, "names no folder", "Set run_dir, such as runs/mine.")
    check_seed(cfg.seed)
    if cfg.evaluation.seed is not None:
        check_seed(cfg.evaluation.seed, "evaluation.seed")
    find_schedule(cfg.schedule)
    for kind in kinds_of(cfg.layout).values():
        kind.heads()
    _check_ranges(cfg)
    _check_optimizer(cfg)
    _check_profile(cfg)
    _check_kept(cfg.checkpoint)
    _check_start(cfg.checkpoint)
    _check_tracking(cfg.tracking)
    _check_exit_step(cfg)
    _check_allowed_changes(cfg)


def check_seed(seed: int, setting: str = "seed") -> None:
    """Check that every random number generator accepts `seed`; ConfigError if not."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise ConfigError(setting, seed, "is out of range", f"Set {setting} to 0 … {_LARGEST_SEED}.")


def check_choice(setting: str, value: str | int) -> None:
    """Raise ConfigError if a setting is not one of its choices.

    Args:
        setting: name in a run's settings.
    """
    choices = _CHOICES[setting]
    if value not in choices:
        raise ConfigError(setting, value, "unknown value", _nearest(setting, value, choices))


def _check_ranges(cfg: PretrainConfig) -> None:
    for setting in _CHOICES:
        check_choice(setting, _get(cfg, setting))
    for setting in _names(_POSITIVE):
        value = _get(cfg, setting)
        if value is not None and value <= 0:
            raise ConfigError(setting, value, "must be more than 0", f"Set {setting} to a positive number.")
    for setting in _names(_NOT_NEGATIVE):
        value = _get(cfg, setting)
        if value is not None and value < 0:
            raise ConfigError(setting, value, "must not be negative", f"Set {setting} to 0 or more.")
    for setting, (most, problem) in _MOST.items():
        if (value := _get(cfg, setting)) > most:
            raise ConfigError(setting, value, problem, f"Set {most:,} or less.")
    check_sequence("train.seq_length", cfg.train.seq_length, cfg.layout.block_size)


def longest_sequence(block_size: int) -> int:
    """Return the most tokens that a layout of such blocks covers."""
    return _MOST_BLOCKS * block_size


def check_sequence(setting: str, tokens: int, block_size: int) -> None:
    """Check that a sequence is short enough for a layout.

    Raises:
        ConfigError: on `setting`, if it is.
    """
    if block_size > 0 and tokens > (most := longest_sequence(block_size)):  # `check_values` rejects another block size
        problem = f"is more than {_MOST_BLOCKS:,} blocks of layout.block_size={block_size}"
        raise ConfigError(setting, tokens, problem, f"Set {most} or less, or a larger layout.block_size.")


def _check_optimizer(cfg: PretrainConfig) -> None:
    optim = cfg.optim
    for setting in ("optim.beta1", "optim.beta2"):
        beta = _get(cfg, setting)
        if not 0 <= beta < 1:
            raise ConfigError(setting, beta, "a decay rate lies in [0, 1)", f"Set {setting}, such as 0.9.")
    _check_lowest_lr(optim)
    decay_steps = optim.decay_steps or cfg.train.steps
    if optim.warmup_steps >= decay_steps:
        warm_up, end = length(cfg, "optim.warmup_steps"), "optim.decay_steps" if optim.decay_steps else "train.steps"
        raise ConfigError(
            warm_up.setting,
            warm_up.value,
            f"the warm-up would not end before {length(cfg, end)}",
            f"Set {warm_up.setting} to less than {warm_up.of(decay_steps)}, such as {warm_up.of(decay_steps // 10)}.",
        )
    _check_second_warmup(cfg)
    if optim.decay_style != "WSD" and (given := optim.wsd_decay_tokens or optim.wsd_decay_steps):
        name = "optim.wsd_decay_steps" if optim.wsd_decay_tokens is None else "optim.wsd_decay_tokens"
        problem = f"only WSD has a separate final decay, and optim.decay_style={optim.decay_style}"
        raise ConfigError(name, given, problem, f"Set optim.decay_style=WSD, or {name}=null.")
    if optim.decay_style == "WSD":
        last, most = length(cfg, "optim.wsd_decay_steps"), decay_steps - optim.warmup_steps
        if last.steps is None or last.steps > most:
            raise ConfigError(
                last.setting,
                last.value,
                f"WSD decays over the last of {decay_steps} steps, of which {optim.warmup_steps} are warm-up",
                f"Set {last.setting} to {last.of(most)} or less.",
            )


def _check_second_warmup(cfg: PretrainConfig) -> None:
    frozen, steps, given = cfg.train.freeze_trunk_steps, cfg.train.steps, cfg.optim.trunk_warmup_steps
    if not frozen and given is not None:
        problem, remedy = "no trunk is frozen before it", "Set train.freeze_trunk_steps too, or leave it out."
        raise ConfigError("optim.trunk_warmup_steps", given, problem, remedy)
    warm_up = cfg.optim.second_warmup_steps
    if 0 < frozen < steps < (last := frozen + warm_up):
        problem = (
            f"the warm-up after train.freeze_trunk_steps={frozen} would end at step {last}, after train.steps={steps}"
        )
        unset = " (left unset, it is optim.warmup_steps)" if given is None else ""
        raise ConfigError("optim.trunk_warmup_steps", warm_up, problem, f"Set {steps - frozen} or less{unset}.")


def _check_lowest_lr(optim: OptimConfig) -> None:
    ratio, lowest = optim.min_lr_ratio, optim.lowest_lr
    if ratio is not None and ratio > 1:
        raise ConfigError("optim.min_lr_ratio", ratio, "is a share of optim.lr", "Set it to 1 or less, such as 0.1.")
    if ratio is not None and lowest != optim.scaled_lr:
        problem = f"gives a lowest learning rate of {optim.scaled_lr:g}, which conflicts with optim.min_lr={lowest:g}"
        remedy = "Set optim.min_lr=null, or optim.min_lr_ratio=null."
        raise ConfigError("optim.min_lr_ratio", ratio, problem, remedy)
    if lowest > optim.lr:
        remedy = f"Set it to {optim.lr} or less, or optim.min_lr=null for a tenth of optim.lr."
        raise ConfigError("optim.min_lr", lowest, f"above optim.lr={optim.lr}", remedy)


def _check_profile(cfg: PretrainConfig) -> None:
    steps, ranks = cfg.profile.steps, cfg.profile.ranks
    last = cfg.train.last_step
    if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= last):
        problem = f"is not a first and a last step within the run's {last}"
        raise ConfigError("profile.steps", steps, problem, f"Set profile.steps=[{max(last - 2, 1)},{last}], or null.")
    if any(rank < 0 for rank in ranks):
        raise ConfigError("profile.ranks", ranks, "ranks count from 0", "Set profile.ranks=[0].")


def _check_kept(checkpoint: CheckpointConfig) -> None:
    every, interval = checkpoint.keep_every, checkpoint.interval
    if every is None:
        return
    if checkpoint.keep is None:
        problem = "without checkpoint.keep all checkpoints are kept"
        raise ConfigError("checkpoint.keep_every", every, problem, "Set checkpoint.keep too, such as 2.")
    if every % interval:
        problem = f"checkpoint.interval={interval} saves no checkpoint at most of its multiples"
        near = interval * max(1, round(every / interval))
        raise ConfigError("checkpoint.keep_every", every, problem, f"Set a multiple of the interval, such as {near}.")


def _check_start(checkpoint: CheckpointConfig) -> None:
    if not checkpoint.weights_only:
        return
    if checkpoint.resume in ("auto", "never"):
        problem = f"checkpoint.resume={checkpoint.resume} names no run to take weights from"
        raise ConfigError("checkpoint.weights_only", True, problem, "Set checkpoint.resume=RUN_DIR too.")
    if checkpoint.new_data:
        problem = "checkpoint.new_data=true takes the optimizer's state along"
        raise ConfigError("checkpoint.weights_only", True, problem, "Set one of the two.")


def _check_tracking(tracking: TrackingConfig) -> None:
    for setting in ("project", "entity", "group", "name"):
        if getattr(tracking, setting) == "":
            raise ConfigError(f"tracking.{setting}", "", "is empty", f"Leave it out, or set tracking.{setting}=NAME.")
    if any(not 1 <= len(tag) <= _LONGEST_TAG for tag in tracking.tags):
        problem = f"wandb takes tags of 1 to {_LONGEST_TAG} characters"
        raise ConfigError("tracking.tags", tracking.tags, problem, "Shorten them, or put the text into tracking.notes.")


def _check_exit_step(cfg: PretrainConfig) -> None:
    exit_step, steps = cfg.train.exit_step, cfg.train.steps
    if exit_step is not None and exit_step > steps:
        end = length(cfg, "train.steps")
        problem = f"the run ends before it, at {end}"
        remedy = f"Set train.exit_step to {steps} or less, or more {end.setting}."
        raise ConfigError("train.exit_step", exit_step, problem, remedy)


# Sections whose settings are free: one may be gone since the checkpoint.
_FREE_FORM = ("optim.options.", "layout.patterns.", "layout.kinds.")


def _check_allowed_changes(cfg: PretrainConfig) -> None:
    allowed = cfg.checkpoint.allow_changes
    if isinstance(allowed, bool):
        return
    known = [name for name, _ in settings_by_name(asdict(cfg))]
    for name in allowed if isinstance(allowed, list | tuple) else [allowed]:
        if name not in known and not str(name).startswith(_FREE_FORM):
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            remedy = f"Set checkpoint.allow_changes=true, or names of settings. Did you mean {near}?"
            raise ConfigError("checkpoint.allow_changes", allowed, f"{name} is not a setting", remedy)


def _nearest(setting: str, value: object, choices: Sequence[str | int]) -> str:
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.0)[0]
    return f"Did you mean {setting}={near}? It may be {', '.join(names)}."


def _names(of_section: dict[str, tuple[str, ...]]) -> list[str]:
    return [f"{section}.{name}" for section, names in of_section.items() for name in names]


def _floats(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield name and value of every float in a section, recursively."""
    for field in fields(section):
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _floats(value, f"{prefix}{field.name}.")
        elif isinstance(value, float):
            yield prefix + field.name, value


def _get(cfg: PretrainConfig, setting: str) -> Any:
    value: Any = cfg
    for part in setting.split("."):
        value = getattr(value, part)
    return value
