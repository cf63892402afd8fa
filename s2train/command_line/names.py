"""Looks up settings by their dotted names, and suggests the nearest."""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from s2train.errors import ConfigError


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
