"""Explains composition errors of saved files, such as an experiment's."""

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from s2train.command_line.names import type_of, unknown_name, what_it_takes
from s2train.errors import ConfigError

_IN_FILE = re.compile(r"In '(?P<group>[^']+)/(?P<name>[^'/]+)': (?P<problem>.*)")
_MISSING_FILE = re.compile(r"Could not find '(?P<group>[^']+)/(?P<name>[^'/]+)'")
_VALUE = re.compile(r"Value '(.*?)'")
_FULL_KEY = re.compile(r"^\s+full_key: (?P<key>\S+)$", re.M)
_NOT_A_SECTION = re.compile(r"Merge error: \w+ is not a subclass of (?P<section>\w+)\. value: (?P<value>.*)")
_WHOLE = "# @package _global_"


def explain_file(message: str, groups: Mapping[str, Sequence[str]], schema: type) -> str | None:
    """Explain a message about a saved file in one line, or None.

    Args:
        groups: names by configuration group.
        schema: the dataclass of the program's settings.
    """
    first, *rest = message.splitlines()
    if (found := _IN_FILE.match(first)) is None:
        return None
    file, group, problem = f"{found['group']}/{found['name']}.yaml", found["group"], found["problem"]
    if missing := _MISSING_FILE.match(problem):
        there = ", ".join(groups.get(missing["group"], ())) or "none"
        return f"{file}: {missing['group']}={missing['name']}: unknown name. There are {there}."
    if not rest:
        return f"{file}: {problem} Correct the file's defaults."
    cause, key = rest[0].rstrip("."), _FULL_KEY.search(message)
    if key is not None and key["key"] == group:
        problem = f"its settings belong to the section {group}, which doesn't exist"
        return f"{file}: {problem}. Begin the file with the line `{_WHOLE}`."
    if key is not None and "not in" in cause:
        error = unknown_name(key["key"], "", schema, ())
        return f"{file}: {key['key']}: {error.problem}. {error.remedy}"
    if key is not None:
        value = _VALUE.search(cause)
        takes = what_it_takes(value[1] if value else "", type_of(key["key"], schema))
        return f"{file}: {key['key']}: {cause}. {takes}"
    if section := _NOT_A_SECTION.match(cause):
        names = next(_sections(schema, "", section["section"]), "")
        return f"{file}: {names}: {section['value']} is no section of settings. Write one setting a line below {names}."
    return f"{file}: {cause}."


def yaml_error(folder: str, config_path: str, error: yaml.YAMLError) -> ConfigError:
    """Explain where a file's YAML is wrong.

    Args:
        folder: of configurations.
        config_path: the file's path in it, such as `experiment/mine.yaml`.
    """
    file = Path(folder, f"{config_path.removesuffix('.yaml')}.yaml")
    group, _, name = config_path.removesuffix(".yaml").rpartition("/")
    mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
    line = "" if mark is None else f", line {mark.line + 1}"
    remedy = "Correct the file: close brackets and quotes, indent with spaces, and put a space after each colon."
    return ConfigError(group or "--config-name", name, f"{file}{line} is not YAML ({reason})", remedy)


def _sections(schema: type, prefix: str, wanted: str) -> Iterator[str]:
    """Yield the dotted names of sections whose dataclass is called `wanted`."""
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            if typing.cast(type, kind).__name__ == wanted:
                yield f"{prefix}{name}"
            yield from _sections(typing.cast(type, kind), f"{prefix}{name}.", wanted)
