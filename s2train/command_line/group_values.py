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
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key not in groups:
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
        except HydraException:  # explained when Hydra rejects it
            continue
        names = values_of(override)
        if has_groups and key != _MERGED and isinstance(override.value(), list) and len(names) > 1:
            listed = ",".join(map(str, names))
            remedy = f"Write one, or run each: -m {argument.partition('=')[0]}={listed}"
            raise ConfigError(argument.partition("=")[0], value, "would merge several files", remedy)
        if has_groups and any(name is None or isinstance(name, int | float | RangeSweep) for name in names or [None]):
            plus = "+" if argument.startswith("+") or key == "model" else ""  # `model` has no default
            remedy = f"Write {plus}{key}=NAME. There are {', '.join(groups[key])}."
            raise ConfigError(argument.partition("=")[0], value, "names no file", remedy)
        kind = type_of(key, schema)
        if not has_groups and kind is None:
            raise unknown_name(key, value, schema, ())
        if not has_groups and not all(isinstance(name, dict) for name in names):
            raise ConfigError(key, value, "is a section of settings", one_of_section(key, kind))


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
