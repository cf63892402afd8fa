"""Writes settings and commands as a user types them in a shell."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from s2train.command_line.overrides import quote_where_needed, quoted, without_interpolation
from s2train.errors import as_typed


def hydra_setting(name: str, value: object) -> str:
    """Write a setting so that Hydra reads exactly this value.

    Text is quoted only where Hydra would read something else.
    """
    return f"{name}={_value(value)}"


def hydra_settings(values: Mapping[str, object]) -> list[str]:
    """Write each setting as `hydra_setting`.

    Args:
        values: by name.
    """
    return [hydra_setting(name, value) for name, value in values.items()]


def text_of_setting(word: str) -> str:
    """Return a typed setting's text, without its quotes."""
    [word] = quote_where_needed([word])
    given = word.partition("=")[2]
    value = _read(given)
    return value if isinstance(value, str) else given


def shell_setting(name: str, value: object) -> str:
    """Write a setting as `hydra_setting`, quoted for the shell where needed."""
    return shlex.quote(hydra_setting(name, value))


def python_command(program: str, *words: object) -> str:
    """Write the shell command that runs a program.

    Args:
        words: its arguments, not quoted for the shell.
    """
    return shlex.join(["python", program, *map(str, words)])


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    return _text(str(value)) if isinstance(value, str | Path) else as_typed(value)


def _text(text: str) -> str:
    """Text as Hydra reads it, also in a list."""
    if "${" not in text and _read(f"[{text}]") == [text] and _read(text) == text:
        return text
    return quoted(without_interpolation(text), '"' if '"' not in text else "'")


def _read(value: str) -> object:
    """Value that Hydra reads; None if it can't."""
    try:
        return OverridesParser.create().parse_override(f"x={value}").value()
    except HydraException:
        return None
