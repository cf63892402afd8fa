"""Settings as a user types them, in the quotes that Hydra's grammar wants."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Hydra's own functions: what looks like a call of one is none of a file's name.
_CALL = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|int|float|str|bool|json_str)\(")


def quoted(value: object) -> str:
    """A value that Hydra reads as this very text."""
    # A backslash is one everywhere but before a quote, where it wants another.
    text = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), str(value))
    return f"'{text}'"


def readable(arguments: Sequence[str]) -> list[str]:
    """A command line whose plain texts, and lists of them, Hydra reads as they are.

    Its grammar knows no letters but English ones outside quotes, and few signs. What it reads stays as it is, and so
    does what may have been meant otherwise: with a comma outside a list, or with quotes, brackets or a call in it.
    """
    return [_readable(argument) for argument in arguments]


def why_unreadable(arguments: Sequence[str], number: int) -> str | None:
    """Why Hydra can't read one argument of a command line, and in which quotes it would; None if it can."""
    if (reason := _reason(arguments[number])) is None:
        return None
    return f"can't be read: {reason}. {_remedy(arguments[number], arguments[:number], arguments[number + 1 :])}"


def _readable(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or _reason(argument) is None:
        return argument
    if value[:1] == "[" and value[-1:] == "]":
        texts = [text.strip() for text in value[1:-1].split(",")]
        again = f"{key}=[{','.join(text if _reason(f'key={text}') is None else quoted(text) for text in texts)}]"
        is_plain = not re.search(r"[\[\]{}'\"]", value[1:-1])
    else:
        again, is_plain = f"{key}={quoted(value)}", not re.match(r"[\[{'\"]", value) and "," not in value
    return again if is_plain and not _CALL.match(value) and _reason(again) is None else argument


def _reason(override: str) -> str | None:
    """Why Hydra can't read an override, in its words; None if it can."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        # The reason is the line after "Error parsing override …".
        return next(line for line in str(error).splitlines() if not line.startswith("Error parsing"))
    return None


def _remedy(text: str, before: Sequence[str], after: Sequence[str]) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        whole = f" If it belongs to what precedes it, quote both for the shell: '{before[-1]} {text}'" if before else ""
        return f"Write {text}=VALUE.{whole}"
    if value.count("[") > value.count("]"):
        return f"Close the bracket. A list with blanks wants quotes: '{' '.join([text, *after[:1]]).rstrip(']')}]'"
    if value.startswith("["):
        return f'Put each text in quotes, within the shell\'s: \'{key}=["…","…"]\''
    return f"Put it in quotes, within the shell's: '{key}=\"{value}\"'"
