"""Quotes settings as users type them for Hydra's grammar."""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Hydra's own functions: text that looks like a call of one is no file name.
_CALL = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|extend_list|int|float|str|bool|json_str)\(")

# A list in brackets, or one text in quotes: what a text setting may hold in Hydra's grammar.
_LIST_OR_QUOTED = re.compile(r"""\[.*\]|'([^'\\]|\\.)*'|"([^"\\]|\\.)*\"""", re.S)

# Settings that Hydra certainly parses: its parser takes milliseconds for each.
_PARSED = re.compile(r"\+{0,2}[A-Za-z_]\w*(\.[A-Za-z_]\w*)*=[\w./+-]+", re.ASCII)


def quoted(value: object, mark: str = "'") -> str:
    """Quote a value so that Hydra reads exactly this text.

    Args:
        mark: single or double quote.
    """
    # A backslash is literal, except before a quote, where it must be doubled.
    text = re.sub(rf"(\\*)({mark}|$)", lambda found: found[1] * 2 + (f"\\{mark}" if found[2] else ""), str(value))
    return f"{mark}{text}{mark}"


def without_interpolation(text: str) -> str:
    """Escape a text so that OmegaConf reads exactly this text."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def quote_where_needed(arguments: Sequence[str]) -> list[str]:
    """Quote plain texts, and lists of them, that Hydra can't parse unquoted.

    Outside quotes its grammar allows only English letters and a few signs. What it can parse stays unchanged, and so
    does what could mean something else: values with a comma outside a list, quotes, brackets or a call.
    """
    return [_quote_if_needed(argument) for argument in arguments]


def quote_text(arguments: Sequence[str], setting: str) -> list[str]:
    """Quote a text setting's values so that Hydra reads them as typed.

    Leaves lists in brackets, and what is already in quotes.
    """
    return [
        f"{key}={quoted(without_interpolation(value))}"
        if equals and key.lstrip("+") == setting and not _LIST_OR_QUOTED.fullmatch(value)
        else argument
        for argument in arguments
        for key, equals, value in [argument.partition("=")]
    ]


def syntax_problem(arguments: Sequence[str], number: int) -> str | None:
    """Explain, with a remedy, why Hydra can't parse an argument, or None."""
    if (reason := _parse_error(arguments[number])) is None:
        return None
    return f"can't be parsed: {reason}. {_remedy(arguments[number], arguments[:number], arguments[number + 1 :])}"


def _quote_if_needed(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or _PARSED.fullmatch(argument) or _parse_error(argument) is None:
        return argument
    if value[:1] == "[" and value[-1:] == "]":
        texts = [text.strip() for text in value[1:-1].split(",")]
        again = f"{key}=[{','.join(text if _parse_error(f'key={text}') is None else quoted(text) for text in texts)}]"
        is_plain = not re.search(r"[\[\]{}'\"]", value[1:-1])
    else:
        again, is_plain = f"{key}={quoted(value)}", not re.match(r"[\[{'\"]", value) and "," not in value
    return again if is_plain and not _CALL.match(value) and _parse_error(again) is None else argument


def _parse_error(override: str) -> str | None:
    """Return Hydra's message if it can't parse an override, or None."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException as error:
        # The reason is the line after "Error parsing override …".
        return next(line for line in str(error).splitlines() if not line.startswith("Error parsing"))
    return None


def _remedy(text: str, before: Sequence[str], after: Sequence[str]) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        if not before:
            return f"Write {text}=VALUE."
        preceding = re.sub(r"='(.*)'$", r"=\1", before[-1])
        divided = f"If it belongs to the preceding argument, quote both for the shell: '{preceding} {text}'"
        return f"Write {text}=VALUE. {divided}"
    if value.count("[") > value.count("]"):
        return f"Close the bracket. A list with spaces needs quotes: '{' '.join([text, *after[:1]]).rstrip(']')}]'"
    if value.startswith("["):
        return f'Quote each text within the shell\'s quotes: \'{key}=["…","…"]\''
    return f"Quote it within the shell's quotes: '{key}=\"{value}\"'"
