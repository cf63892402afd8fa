"""Looks up settings by their dotted names, and suggests the nearest."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from s2train.errors import ConfigError

_WITH_UNIT = re.compile(r"(\d+(?:\.\d+)?)([kmgbt])", re.I)


def unknown_name(key: str, value: object, schema: type, groups: Iterable[str]) -> ConfigError:
    every = list(_names(schema, ""))
    if "." in key:
        near = nearest(key, every)
    else:  # a group, a section, or a setting without its section
        short = {name.rpartition(".")[2]: name for name in reversed(every)} | {group: group for group in groups}
        near = short[nearest(key, list(short))]
    section = near.rpartition(".")[0]
    siblings = [name.rpartition(".")[2] for name in every if name.rpartition(".")[0] == section]
    there = f"{section} has" if section else "There are"
    return ConfigError(key, value, "no such setting", f"Did you mean {near}? {there} {', '.join(siblings)}.")


def one_of_section(key: str, kind: Any) -> str:
    """Make the remedy for a value given to a section (a dataclass)."""
    return f"Set one of {', '.join(f'{key}.{field.name}' for field in dataclasses.fields(kind))}."


def nearest(name: str, choices: Sequence[str]) -> str:
    return difflib.get_close_matches(name, choices, n=1, cutoff=0.0)[0]


def _names(schema: type, prefix: str) -> Iterator[str]:
    """Yield the dotted name of every setting and section."""
    for name, kind in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            yield from _names(typing.cast(type, kind), f"{prefix}{name}.")


def type_of(key: str, schema: Any) -> Any:
    """Return a setting's type by its dotted name; None if unknown."""
    for part in key.split("."):
        if not dataclasses.is_dataclass(schema):
            return schema if typing.get_origin(schema) is dict or schema is Any else None  # may hold any name
        schema = typing.get_type_hints(schema).get(part)
    return schema


def what_it_takes(value: str, kind: Any) -> str:
    """Say what a setting of type `kind` takes in place of `value`."""
    name = "true or false" if kind is bool else kind.__name__ if isinstance(kind, type) else kind
    number = _WITH_UNIT.fullmatch(value)
    if number is None or not {"int", "float"} & set(re.findall(r"\w+", str(name))):
        return f"It takes {name}."
    power = "kmgt".index(number[2].lower().replace("b", "g")) + 1
    written = [f"{float(number[1]) * unit**power:.0f}" for unit in (1000, 1024)]
    return f"It takes {name}, without a unit: {written[0]} or {written[1]}."
