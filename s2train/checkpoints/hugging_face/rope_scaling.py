"""RoPE scaling in Hugging Face's form, as `rope_scaling` of config.json."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from s2train.config import ModelConfig
from s2train.errors import ConfigError, as_typed
from s2train.rope_scaling import RopeScalingConfig, with_defaults
from s2train.validation.rope_scaling import check_rope_scaling

# Our settings by their names in Hugging Face's form.
_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
# Read elsewhere, or without an effect on the angles.
_OTHERS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim"}
_KINDS = ("linear", "yarn", "llama3")


def to_hugging_face(scaling: RopeScalingConfig) -> dict[str, Any] | None:
    """Return the value of `rope_scaling`; None without scaling."""
    if scaling.kind == "none":
        return None
    filled = with_defaults(scaling).given
    if filled.get("truncate"):
        del filled["truncate"]  # the default; transformers before 4.56 warn of the name
    if scaling.attention_factor is None:
        filled.pop("attention_factor", None)
    ours = {name: theirs for theirs, name in _NAMES.items()}
    return {"rope_type": scaling.kind, **{ours[name]: value for name, value in filled.items()}}


def longest_length(model: ModelConfig, trained: int) -> int:
    """Return `max_position_embeddings` of a model trained on `trained` tokens.

    Under YaRN it is factor · original_length: transformers 4.48 to 4.55 take the factor from it.
    """
    scaling = model.rope_scaling
    if scaling.kind != "yarn":
        return trained
    assert scaling.factor is not None
    assert scaling.original_length is not None
    return round(scaling.factor * scaling.original_length)


def from_hugging_face(config: dict[str, Any], model: ModelConfig, folder: Path) -> RopeScalingConfig:
    """Read the scaling from a config.json.

    It is `rope_scaling` in that of transformers 4, and `rope_parameters` in that of 5.

    Args:
        model: the model without scaling.
        folder: folder of config.json, for errors.
    Raises:
        ConfigError: on `weights`, if the scaling is of another kind, or a setting is unknown, missing or out of range.
    """
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = rope_section(config, name, folder)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", *_KINDS):
        raise _error(folder, name, given, f"kind {kind}", f"Models with {', '.join(_KINDS)} or no scaling can")
    if unknown := sorted(given.keys() - _NAMES.keys() - _OTHERS):
        raise _error(folder, name, given, f"{unknown[0]}, which is unknown here", "Remove what has no effect")
    if kind == "default":
        return RopeScalingConfig()
    try:
        scaling = _scaling(kind, given, config.get("max_position_embeddings"))
        if scaling.factor == 1:
            return RopeScalingConfig()  # all three forms leave the angles as they are
        check_rope_scaling(replace(model, rope_scaling=scaling))
    except ConfigError as error:
        problem = f"{error.setting.rpartition('.')[2]}={as_typed(error.value)}: {error.problem}"
        raise _error(folder, name, given, problem, "Fix config.json") from error
    except (TypeError, ValueError) as error:
        raise _error(folder, name, given, str(error), "Fix config.json") from error
    return scaling


def rope_section(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """Return a section of a config.json; empty if it has none.

    Raises:
        ConfigError: on `weights`, if it is something else.
    """
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise _error(folder, name, given, "not settings by name", "Fix config.json")
    return given


def _scaling(kind: str, given: dict[str, Any], longest: int | None) -> RopeScalingConfig:
    """Return unchecked settings.

    Args:
        longest: `max_position_embeddings`, from which missing settings follow as in transformers.
    """
    types: dict[str, Any] = {"original_length": int, "truncate": bool}
    read: dict[str, Any] = {}
    for key, value in given.items():
        if key in _NAMES and value is not None:
            read[_NAMES[key]] = types.get(_NAMES[key], float)(value)
    scaling = RopeScalingConfig(kind, **read)
    if kind == "yarn" and scaling.factor is None and longest and scaling.original_length:
        scaling.factor = longest / scaling.original_length
    if kind != "linear" and scaling.original_length is None:
        scaling.original_length = longest
    parts = [given.get(name) for name in ("mscale", "mscale_all_dim")]
    if kind == "yarn" and scaling.factor and scaling.attention_factor is None and all(parts):
        above, below = (0.1 * float(part) * math.log(scaling.factor) + 1 for part in parts if part)
        scaling.attention_factor = above / below
    return scaling


def _error(folder: Path, name: str, given: object, problem: str, remedy: str) -> ConfigError:
    return ConfigError("weights", folder, f"config.json has {name}={as_typed(given)}: {problem}", remedy)
