"""Generates programs' help from the settings' dataclasses and their comments."""

import ast
import dataclasses
import inspect
import io
import json
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import MISSING

Groups = Mapping[str, Sequence[str]]

EXPERIMENT = "experiment"  # group of files that set a whole run, its model too
_COLUMN = 40  # start of the comments, in lines of at most 120 characters


def usage(doc: str, schema: type, groups: Groups, others: Mapping[type, str]) -> str:
    """Format the whole help of a program.

    Args:
        doc: docstring of its module, with its commands.
        schema: the dataclass of its settings.
        groups: names by configuration group; those that the schema has a section for are shown.
        others: dataclasses of further settings, each with its prefix.
    """
    lines = [doc.strip()]
    if named := _named(schema, groups):
        lines += ["", "Named values, each a file of conf/ that sets several settings:", *named]
    lines += ["", "Settings, with their defaults (null is None):", *_section(schema, "")]
    for other, prefix in others.items():
        lines += ["", *_wrapped(f"{prefix}: {summary(other)}"), *_section(other, f"{prefix}.")]
    return "\n".join(
        [*lines, "", "Hydra's own options: --cfg job prints the composed settings, --hydra-help lists the rest."]
    )


def brief_usage(doc: str, schema: type, groups: Groups) -> str:
    """Format a program's short help: its commands and required settings."""
    required = [field.name for field in dataclasses.fields(schema) if _default(field) == MISSING]
    plain = [line for name in required if name not in groups for line in _entry(f"{name}=…", meaning(schema, name))]
    named = _named(schema, {name: names for name, names in groups.items() if name in required})
    return "\n".join([doc.strip(), "", "Required:", *named, *plain, "", "--help shows every setting."])


def meaning(schema: type, setting: str) -> str:
    """Return a setting's comment or a section's summary; may be empty.

    Args:
        setting: dotted name.
    """
    first, _, rest = setting.partition(".")
    kind = typing.get_type_hints(schema).get(first)
    if rest and dataclasses.is_dataclass(kind):
        return meaning(typing.cast(type, kind), rest)
    return _comments(schema).get(first) or (summary(kind) if dataclasses.is_dataclass(kind) else "")


def _named(schema: type, groups: Groups) -> list[str]:
    shown: list[str] = []
    if EXPERIMENT in groups and "model" in typing.get_type_hints(schema):
        shown += _entry(f"+{EXPERIMENT}=NAME", ", ".join(groups[EXPERIMENT]))
    for field in dataclasses.fields(schema):
        if field.name in groups:
            plus = "+" if _default(field) == MISSING else ""  # Hydra's syntax for a group without a default
            shown += _entry(f"{plus}{field.name}=NAME", ", ".join(groups[field.name]))
    return shown


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as users type it.

    Attributes:
        value: its default in the syntax of a command line; "…" if it must be set.
        kind: its type, without None.
    """

    name: str
    value: str
    kind: str
    comment: str


def settings_of(schema: type, prefix: str) -> Iterator[Setting]:
    """Yield a section's own settings, without those of its sections."""
    kinds, comments = typing.get_type_hints(schema), _comments(schema)
    for field in _fields(schema):
        if not dataclasses.is_dataclass(kinds[field.name]):
            value = _default(field)
            shown = "…" if value == MISSING else value if isinstance(value, str) else json.dumps(value)
            yield Setting(prefix + field.name, shown, _kind(kinds[field.name]), comments.get(field.name, ""))


def sections_of(schema: type) -> Iterator[tuple[str, type, str]]:
    """Yield each section of a section: name, dataclass, and what it holds."""
    kinds, comments = typing.get_type_hints(schema), _comments(schema)
    for field in _fields(schema):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield field.name, typing.cast(type, kind), comments.get(field.name) or summary(kind)


def _fields(schema: type) -> list["dataclasses.Field[Any]"]:
    return [field for field in dataclasses.fields(schema) if not field.name.startswith("_")]


def _section(schema: type, prefix: str) -> Iterator[str]:
    # Top-level settings come before sections.
    for setting in settings_of(schema, prefix):
        note = f"({setting.kind}) " if setting.value in ("null", "…") else ""
        yield from _entry(f"{setting.name}={setting.value}", note + setting.comment)
    for name, section, comment in sections_of(schema):
        yield ""
        yield from _wrapped(f"{prefix}{name}: {comment}")
        yield from _section(section, f"{prefix}{name}.")


def _entry(name: str, comment: str) -> Iterator[str]:
    first = f"  {name}  ".ljust(_COLUMN)
    yield from textwrap.wrap(
        comment, 120, initial_indent=first, subsequent_indent=" " * _COLUMN, break_on_hyphens=False
    ) or [first.rstrip()]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False)


def _kind(kind: Any) -> str:
    """Format a type as in Python, without None, which the default shows."""
    if kind is Any:
        return "a value or a list"
    arms = (
        [arm for arm in typing.get_args(kind) if arm is not type(None)] if type(None) in typing.get_args(kind) else []
    )
    kind = arms[0] if len(arms) == 1 else kind
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return None if dataclasses.is_dataclass(field.default_factory) else field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def summary(kind: Any) -> str:
    """Return the first paragraph of a class's docstring, in one line."""
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _comments(schema: type) -> dict[str, str]:
    """Collect each field's comments: those above, then the trailing one.

    Fields of base classes are included.
    """
    found: dict[str, str] = {}
    for part in reversed(schema.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(part))
        comments, alone = {}, set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = token.string.lstrip("# ")
                if token.line.lstrip().startswith("#"):
                    alone.add(token.start[0])
        (definition,) = ast.parse(source).body
        assert isinstance(definition, ast.ClassDef)
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [*range(first, node.lineno), node.end_lineno]
                found[node.target.id] = " ".join(comments[line] for line in lines if line in comments)
    return found
