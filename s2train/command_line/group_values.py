"""Rejects values that name no file of a group, such as model=null."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

from s2train.command_line.names import one_of_section, type_of, unknown_name
from s2train.errors import ConfigError

_MERGED = "experiment"  # a group whose files may be merged


def check_group_values(arguments: Iterable[str], groups: Mapping[str, Sequence[str]], schema: type) -> None:
    """Check that the values of configuration groups can be names.

    Hydra ends in a stack for null, numbers and truth values, takes an empty list for none, and merges the files of a
    longer one.

    Args:
        groups: names by configuration group, of programs whose settings have a model.
        schema: the dataclass of this program's settings.
    Raises:
        ConfigError: a value can't be a name, there are several, or the program has no such group.
    """
    has_groups = type_of("model", schema) is not None
    parser = OverridesParser.create()
    for argument in arguments:
        setting, _, value = argument.partition("=")
        key = setting.lstrip("+")
        if key not in groups:
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:  # explained when Hydra rejects it
            continue
        if has_groups:
            _check_name(setting, value, override, groups[key])
        elif (kind := type_of(key, schema)) is None:
            raise unknown_name(key, value, schema, ())
        elif not all(isinstance(one, dict) for one in values_of(override)):
            raise ConfigError(key, value, "is a section of settings", one_of_section(key, kind))


def _check_name(setting: str, value: str, override: Override, there: Sequence[str]) -> None:
    """Check that a value is a name, or a sweep of names."""
    key, names = setting.lstrip("+"), values_of(override)
    if key != _MERGED and isinstance(override.value(), list) and len(names) > 1:
        remedy = f"Write one, or have launch/pretrain.py run each: -m {setting}={','.join(map(str, names))}"
        raise ConfigError(setting, value, "would merge several files", remedy)
    if any(name is None or isinstance(name, int | float | RangeSweep) for name in names or [None]):
        plus = "+" if setting != key or key == "model" else ""  # `model` has no default
        raise ConfigError(setting, value, "names no file", f"Write {plus}{key}=NAME. There are {', '.join(there)}.")


def no_model(models: Sequence[str]) -> ConfigError:
    """Make the error for a run without a model.

    Args:
        models: the names that `+model=` accepts.
    """
    remedy = f"Add +model=NAME, or an +experiment=NAME that names one; models are {', '.join(models)}."
    return ConfigError("+model", "(not set)", "no model is set", remedy)


def values_of(override: Override) -> list[Any]:
    """Return the values of an override, its list or its sweep."""
    value: Any = override.value()
    if isinstance(value, ChoiceSweep):
        return [one.text if isinstance(one, QuotedString) else one for one in value.list]
    return value if isinstance(value, list) else [value]
