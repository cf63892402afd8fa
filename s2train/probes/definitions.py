"""Finds the lines of source code that define an identifier."""

import re

# One alternative per form; each matches from the beginning of a line.
_DEFINITION = re.compile(
    "|".join(
        [
            r"\#[ \t]*define[ \t]+(\w+)",  # C macro
            r"(?:typedef[ \t]+)?(?:struct|union|enum)[ \t]+(\w+)[ \t]*\{",  # C type
            r"[A-Za-z_][\w \t*]*?[ \t*](\w+)[ \t]*\([^;]*$",  # C function: no semicolon on its line
            r"(?:static|const|extern|unsigned|struct)\b[\w \t*]*?[ \t*](\w+)(?:\[[^\]]*\])*[ \t]*=",  # C variable
            r"[ \t]*(?:pub[ \t]+)?(?:def|class|fn|sub|function)[ \t]+(\w+)",  # Python, Rust, Perl, shell
            r"(?:menu)?config[ \t]+(\w+)",  # Kconfig
        ]
    )
)


def line_span(text: str, start: int, stop: int) -> tuple[int, int]:
    """Return the span of the line that holds [start, stop).

    It is the line's first character and one past its end.
    """
    begin = text.rfind("\n", 0, start) + 1
    end = text.find("\n", stop)
    return begin, len(text) if end < 0 else end + 1


def is_definition(text: str, start: int, stop: int) -> bool:
    """Whether the line around [start, stop) defines the name there."""
    begin, end = line_span(text, start, stop)
    match = _DEFINITION.match(text[begin:end].rstrip("\n"))
    if match is None or match.lastindex is None:
        return False
    return match.span(match.lastindex) == (start - begin, stop - begin)
