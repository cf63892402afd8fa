"""Prepares arguments for Hydra, and explains composition errors in one line.

The line suggests the nearest name, which Hydra's own messages don't.
"""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from s2train.command_line.file_errors import explain_file
from s2train.command_line.group_values import check_group_values, no_model, values_of
from s2train.command_line.layout_files import PREFIX, store_layout_files
from s2train.command_line.names import nearest, one_of_section, type_of, unknown_name, what_it_takes
from s2train.command_line.old_names import OLD_NAMES, with_current_names
from s2train.command_line.overrides import quote_where_needed, syntax_problem
from s2train.command_line.sweep_values import check_sweep_values
from s2train.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
_PLAN = re.compile(r"^plan=(?!\{)")
_SPLIT = re.compile(r"^(\+{0,2}data\.split=)([\d., ]*,[\d., ]*)$")
_PAIRS = ("profile.steps", "needles.share", "needles.facts")  # lists of a first and a last, or a least and a most
_IN_BRACES = re.compile(r"[A-Za-z_]\w*:")
_OPTIONS_WITH_VALUES = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"),
    "--experimental-rerun",
)
_MERGING = "Error merging override "
_HYDRA_GROUPS = {
    "hydra/launcher": "s2train_local and s2train_slurm",
    "hydra/sweeper": "basic, and optuna with the extra `sweep` (pip install -e '.[sweep]')",
}


def config_groups(*folders: Path) -> dict[str, list[str]]:
    """List the names in each configuration group, such as layout: [dense, …]."""
    found: dict[str, list[str]] = {}
    for group in (group for folder in folders for group in folder.iterdir() if group.is_dir()):
        found.setdefault(group.name, []).extend(
            file.relative_to(group).as_posix().removesuffix(".yaml")
            for pattern in ("*.yaml", "imported/*.yaml")  # launch/import.py writes the latter
            for file in sorted(group.glob(pattern))
        )
    return found


def own_folders(arguments: Sequence[str]) -> list[Path]:
    """List the folders that a command line adds to conf/ by `--config-dir`."""
    named = [
        value
        for option, value in zip(arguments, [*arguments[1:], ""], strict=True)
        if option in ("--config-dir", "-cd")
    ]
    named += [one.partition("=")[2] for one in arguments if one.startswith("--config-dir=")]
    return [Path(folder) for folder in named if Path(folder).is_dir()]


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """Leave Hydra's options and their values out of a command line."""
    return _divided(arguments)[1]


def options_first(arguments: Sequence[str]) -> list[str]:
    """Move Hydra's options before the overrides.

    On both sides of an option, it would not recognize them.
    """
    options, overrides = _divided(arguments)
    return [*options, *overrides]


def _divided(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into options, with their values, and overrides."""
    options, overrides = list[str](), list[str]()
    for one, before in zip(arguments, ["", *arguments[:-1]], strict=True):
        of_option = before in _OPTIONS_WITH_VALUES or (before in ("--info", "-i") and "=" not in one)
        (options if one.startswith("-") or of_option else overrides).append(one)
    return options, overrides


def hydra_arguments(arguments: Sequence[str], schema: type) -> list[str]:
    """Convert arguments to Hydra's syntax: current names, no shorthand, quoted values.

    Args:
        schema: the dataclass of the program's settings.
    Raises:
        ConfigError: a setting is given by its old name and by its current one, or as an option, `layout=file:…` names
            no layout, a configuration group's value can't be a name, or a sweep has no values.
    """
    _check_dashes(arguments, schema)
    check_group_values(overrides_of(arguments), config_groups(CONF), schema)
    check_sweep_values(overrides_of(arguments))
    if type_of("layout", schema) is not None:
        store_layout_files(arguments)
    old_names = {old: new for old, new in OLD_NAMES.items() if type_of(new, schema) is not None}
    return quote_where_needed(expand_shorthand(with_current_names(arguments, old_names), schema))


def _check_dashes(arguments: Sequence[str], schema: type) -> None:
    """Check that no setting is written as an option.

    Hydra would read -plan as its -p, and run.
    """
    for argument in arguments:
        name, _, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and type_of(name, schema) is not None:
            remedy = f"Write {name}={value or 'VALUE'}."
            raise ConfigError(argument.partition("=")[0], value or "(not set)", "settings have no dashes", remedy)


def expand_shorthand(arguments: Sequence[str], schema: type) -> list[str]:
    """Expand the shorthand of a program's arguments.

    `plan=true` becomes `plan.show=true`, since Hydra can't set a section to a value. `data.split=90,10` is quoted as
    one value, since Hydra reads commas as a list of values to sweep over. In a sweep (-m) it stays such a list.

    Args:
        schema: the dataclass of the program's settings.
    """
    if type_of("plan.show", schema) is not None:
        arguments = [_PLAN.sub("plan.show=", argument) for argument in arguments]
    if {"-m", "--multirun"} & set(arguments):
        return list(arguments)
    return [_SPLIT.sub(r'\1"\2"', argument) for argument in arguments]


def explain(
    error: HydraException,
    overrides: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    schema: type,
    *,
    runs_sweeps: bool = True,
) -> str:
    """Explain a composition error in one line, with the nearest valid name.

    Args:
        overrides: the command line's, such as ``layout.pattern.stride=16``.
        groups: names by configuration group.
        schema: the dataclass of the program's settings.
        runs_sweeps: whether the program takes -m.
    """
    if divided := _divided_braces(overrides):
        return str(divided)
    parser = OverridesParser.create()
    for number, text in enumerate(overrides):
        if problem := syntax_problem(overrides, number):
            return f"{text}: {problem}"
        fault = _name_error(parser.parse_override(text), groups, schema)
        if fault is not None:
            return str(fault)
    return _shorten_message(error, overrides, groups, schema, runs_sweeps)


def check_names(cfg: DictConfig) -> None:
    """Check that a composed configuration has no unknown settings.

    An override with a plus can add any.

    Raises:
        ConfigError: it has one; the error suggests the nearest name.
    """
    for name, value in _unknown_settings(cfg, ""):
        schema = OmegaConf.get_type(cfg)
        assert schema is not None
        raise unknown_name(name, value, schema, ())


def _unknown_settings(node: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    schema = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(schema):
        return
    names = {field.name for field in dataclasses.fields(schema)}
    for key in node:
        name = prefix + str(key)
        if key not in names:
            yield name, OmegaConf.select(node, str(key))
        elif not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            yield from _unknown_settings(node[key], f"{name}.")


def _name_error(override: Override, groups: Mapping[str, Sequence[str]], schema: type) -> ConfigError | None:
    """Return an error if the override has an unknown name."""
    key = override.key_or_group
    if key.partition(".")[0] == "hydra" or "/" in key:
        return None
    plus = "+" if override.is_add() else ""
    if key in groups:
        for value in values_of(override):
            if isinstance(value, str) and value not in groups[key] and not value.startswith(PREFIX):
                sized = [name for name in groups[key] if name.startswith(f"{value}_")]  # 7b: 7b_dense and 7b_hybrid
                near = sized or [nearest(value, groups[key])]
                # `model` is the group without a default, so it needs the plus.
                plus = "+" if key == "model" else plus
                meant = " or ".join(f"{plus}{key}={name}" for name in near)
                remedy = f"Did you mean {meant}? There are {', '.join(groups[key])}."
                return ConfigError(f"{plus if override.is_add() else ''}{key}", value, "unknown name", remedy)
        return None
    shown = (override.input_line or "").partition("=")[2]
    found = type_of(key, schema)
    if found is None:
        return unknown_name(key, shown, schema, groups)
    value = override.value()
    if dataclasses.is_dataclass(found) and isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(found)}
        for name in (str(each) for each in value):
            if name not in known:
                return unknown_name(f"{key}.{name}", value[name], schema, groups)
    return None


def _divided_braces(overrides: Sequence[str]) -> ConfigError | None:
    """Return an error if the shell divided unquoted braces into several overrides."""
    parts: dict[str, list[str]] = {}
    for key, _, value in (text.partition("=") for text in overrides):
        if _IN_BRACES.match(value):
            parts.setdefault(key, []).append(value)
    for key, values in parts.items():
        if len(values) > 1:
            remedy = f"Quote them: '{key}={{{','.join(values)}}}'."
            return ConfigError(key, values[0], "the shell divides braces that are not quoted", remedy)
    return None


def _shorten_message(
    error: HydraException,
    overrides: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    schema: type,
    runs_sweeps: bool,
) -> str:
    """Shorten Hydra's and OmegaConf's messages, and add a remedy for common mistakes."""
    message = str(error).splitlines()
    for key, _, value in (text.lstrip("+").partition("=") for text in overrides):
        if key in _HYDRA_GROUPS and f"'{key}/{value}'" in message[0]:
            return str(ConfigError(key, value, "unknown name", f"There are {_HYDRA_GROUPS[key]}."))
    if about_file := explain_file(str(error), groups, schema):
        return about_file
    cause = str(error.__cause__).splitlines()[0].rstrip(".") if error.__cause__ else ""
    of_sweep = [message[0].removeprefix(_MERGING)] if message[0].startswith(_MERGING) else []  # with one of its values
    if cause == "Missing mandatory value: model":  # a setting of the model, which has no file
        return str(no_model(groups["model"]))
    for text in (*overrides, *of_sweep):
        key, _, value = text.lstrip("+~").partition("=")
        plain = shlex.quote(f"{key}={value}")
        if message[0].startswith(f"Multiple values for {key}.") and text.startswith("+"):
            problem = "another file, such as the experiment's, names one already"
            return str(ConfigError(f"+{key}", value, problem, f"Write {plain} to replace it."))
        if f"'{key}'" in message[0] and not text.startswith("+") and message[0].startswith("Could not override"):
            remedy = f"Write {shlex.quote(f'+{text}')} to add it{', or correct its name' if '.' in key else ''}."
            return str(ConfigError(key, value, "no such entry to override", remedy))
        if message[0] == f"Could not append to config. An item is already at '{key}'.":
            return str(ConfigError(f"+{key}", value, "has a value already", f"Write {plain} to change it."))
        if message[0] == f"Ambiguous value for argument '{text}'":
            return str(_ambiguous(key, value, None if key in groups else type_of(key, schema), runs_sweeps))
        if message[0] == f"Sweep parameters '{text}' requires --multirun":
            return str(
                ConfigError(
                    key, value, "a sweep", f"Write one value{', or add -m to run them all' if runs_sweeps else ''}."
                )
            )
        if message[0].endswith("INTERVAL_SWEEP") and "interval(" in value:
            remedy = f"List values, such as {key}=A,B, or use hydra/sweeper=optuna."
            return str(ConfigError(key, value, "an interval, which only optuna draws from", remedy))
        if message[0].startswith("force-add of config groups"):
            remedy = f"Write +{key}={value} to add it, or {key}={value} to replace another."
            return str(ConfigError(f"++{key}", value, "names a file, which takes one plus or none", remedy))
        if text in message[0] and cause:
            kind = type_of(key, schema)
            remedy = what_it_takes(value, kind)
            if str(kind).startswith("list[") and not value.startswith("["):
                listed = f"{value},{value}" if key in _PAIRS else value
                remedy = f"Write a list: '{key}=[{listed}]'."
            if dataclasses.is_dataclass(kind):
                remedy = one_of_section(key, kind)
            return str(ConfigError(key, value, cause, remedy))
    return ": ".join(line.strip() for line in (*message[:1], cause) if line)


def _ambiguous(key: str, value: str, kind: Any, runs_sweeps: bool) -> ConfigError:
    """Make the error for several values of a setting.

    Args:
        kind: the setting's type; None: a configuration group.
    """
    if kind is Any or str(kind).startswith("list["):
        remedy = f"Write '{key}=[{value}]'{', or -m for a sweep' if runs_sweeps else ''}."
        return ConfigError(key, value, "ambiguous: a list or a sweep", remedy)
    sweep = ", or add -m for a sweep" if runs_sweeps else ""
    remedy = f"Name one of them, such as {key}={value.partition(',')[0]}{sweep}."
    return ConfigError(key, value, f"ambiguous: names several {'files' if kind is None else 'values'}", remedy)
