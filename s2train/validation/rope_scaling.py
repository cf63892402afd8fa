"""Checks a model's scaling of RoPE."""

import difflib
import math

from s2train.config import ModelConfig, head_dim
from s2train.errors import ConfigError
from s2train.rope_scaling import DEFAULTS, REQUIRED, RopeScalingConfig, with_defaults

SETTING = "model.rope_scaling"


def check_rope_scaling(model: ModelConfig, cp: int = 1) -> None:
    """Check the settings of `model.rope_scaling`.

    Args:
        cp: context parallel size.
    Raises:
        ConfigError: on the first setting that is unknown, missing, not the kind's, or out of range.
    """
    scaling = model.rope_scaling
    _check_names(scaling)
    if scaling.kind == "none":
        return
    filled = with_defaults(scaling)
    for name, value in filled.given.items():
        if name != "truncate" and value <= 0:
            raise ConfigError(f"{SETTING}.{name}", value, "must be more than 0", "Set a positive number.")
    assert filled.factor is not None
    if filled.factor <= 1:
        problem = "scaling is for longer sequences than the original ones"
        remedy = f"Set it to more than 1, such as 4, or {SETTING}.kind=none."
        raise ConfigError(f"{SETTING}.factor", filled.factor, problem, remedy)
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        least, most = getattr(filled, low), getattr(filled, high)
        if least is not None and least >= most:
            raise ConfigError(f"{SETTING}.{high}", most, f"not above {SETTING}.{low}={least:g}", "Set a larger number.")
    if scaling.kind != "yarn":
        return
    if model.rotary_base <= 1:
        problem = "YaRN takes the logarithm of the base"
        raise ConfigError("model.rotary_base", model.rotary_base, problem, "Set it to more than 1, such as 10000.")
    assert filled.original_length is not None
    if cp > 1 and filled.original_length % (2 * cp):
        problem = f"Megatron divides that many angles into {2 * cp} parts, with parallel.cp={cp}"
        remedy = f"Set a multiple of {2 * cp}, or parallel.cp=1."
        raise ConfigError(f"{SETTING}.original_length", filled.original_length, problem, remedy)
    _check_range(model, filled)


def _check_range(model: ModelConfig, scaling: RopeScalingConfig) -> None:
    """Reject YaRN where every frequency is a fast one.

    Its formula would then divide all frequencies instead of keeping all.
    """
    assert scaling.original_length is not None
    assert scaling.beta_fast is not None
    rotated = int(head_dim(model) * model.rotary_percent)
    turns = scaling.original_length / (2 * math.pi * scaling.beta_fast)
    first = rotated * math.log(turns) / (2 * math.log(model.rotary_base))
    if (math.floor(first) if scaling.truncate else first) > rotated - 1:
        problem = (
            f"every frequency makes far more than {SETTING}.beta_fast={scaling.beta_fast:g} turns within that length"
        )
        remedy = f"No frequency needs scaling: set {SETTING}.kind=none."
        raise ConfigError(f"{SETTING}.original_length", scaling.original_length, problem, remedy)


def _check_names(scaling: RopeScalingConfig) -> None:
    if scaling.kind not in REQUIRED:
        near = difflib.get_close_matches(scaling.kind, list(REQUIRED), n=1, cutoff=0.0)[0]
        remedy = f"Did you mean {SETTING}.kind={near}? It may be {', '.join(REQUIRED)}."
        raise ConfigError(f"{SETTING}.kind", scaling.kind, "unknown value", remedy)
    required = REQUIRED[scaling.kind]
    taken = {*required, *DEFAULTS[scaling.kind]}
    for name, value in scaling.given.items():
        if name not in taken:
            problem = f"is not a setting of {SETTING}.kind={scaling.kind}"
            kinds = [kind for kind in REQUIRED if name in {*REQUIRED[kind], *DEFAULTS[kind]}]
            raise ConfigError(
                f"{SETTING}.{name}",
                value,
                problem,
                f"Set {SETTING}.{name}=null, or {SETTING}.kind={' or '.join(kinds)}.",
            )
    for name in required:
        if getattr(scaling, name) is None:
            problem = f"{SETTING}.kind={scaling.kind} needs it"
            such = "4" if name == "factor" else "8192, the length that the model was trained on"
            raise ConfigError(f"{SETTING}.{name}", None, problem, f"Set {SETTING}.{name}, such as {such}.")
