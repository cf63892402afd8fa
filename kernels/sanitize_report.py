"""What compute-sanitizer printed, as numbers."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

_MARK = "========= "
_ERRORS = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
_RACES = re.compile(
    r"^========= RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
_HEADS = (
    "Invalid ", "Uninitialized ", "Misaligned ", "Barrier error", "Divergent ", "Out-of-range ", "Missing wait",
    "Error: ", "Warning: ", "Program hit ", "Unused memory", "Internal Sanitizer Error", "Leaked ",
)  # fmt: skip
_KINDS = 8  # different reports that a summary lists
_LAST_LINES = 12


@dataclass(frozen=True)
class Findings:
    """One run of one tool.

    Attributes:
        errors: of its summary; None if it printed none (it was stopped, or crashed).
        warnings: racecheck's; 0 for the other tools.
        kinds: first lines of its reports without addresses and numbers' detail, and how many of each.
        first_report: the first report in full.
    """

    errors: int | None
    warnings: int
    kinds: dict[str, int] = field(default_factory=dict)
    first_report: list[str] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)


def parse(output: str) -> Findings:
    """Findings of what compute-sanitizer and the program under it wrote, interleaved as they may be."""
    errors, races = _ERRORS.findall(output), _RACES.findall(output)
    counted = [int(n) for n in errors] + [int(found) for _, found, _ in races]
    lines = output.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith(tuple(_MARK + head for head in _HEADS))]
    kinds = Counter(_kind(lines[i]) for i in heads)
    return Findings(
        errors=sum(counted) if counted else None,
        warnings=sum(int(warnings) for _, _, warnings in races),
        kinds=dict(kinds.most_common(_KINDS)),
        first_report=_report(lines, heads[0]) if heads else [],
        last_lines=lines[-_LAST_LINES:],
    )


def _kind(line: str) -> str:
    """The line without what differs between reports of one kind."""
    return re.sub(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)|\[\d+ hazards?\]", "…", line.removeprefix(_MARK)).strip()


def _report(lines: list[str], start: int) -> list[str]:
    """From its first line to the empty one that ends it."""
    report = []
    for line in lines[start:]:
        if line.rstrip() == _MARK.rstrip() or not line.startswith(_MARK.rstrip()):
            break
        report.append(line.removeprefix(_MARK))
    return report[:20]
