"""Parse the output of compute-sanitizer."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

KERNELS = "s2_attention"  # in the names of the kernels that the cases run
_MARK = "========= "
_ERRORS = re.compile(r"^========= ERROR SUMMARY: (\d+) errors?", re.MULTILINE)
_RACES = re.compile(
    r"^========= RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", re.MULTILINE
)
_HEADS = (
    "Invalid ", "Uninitialized ", "Misaligned ", "Barrier error", "Divergent ", "Out-of-range ", "Missing wait",
    "Error: ", "Warning: ", "Program hit ", "Unused memory", "Internal Sanitizer Error", "Leaked ",
)  # fmt: skip
_KINDS = 8  # maximum number of different reports in a summary
_LAST_LINES = 12


@dataclass(frozen=True)
class Findings:
    """Result of one run of one tool.

    Attributes:
        errors: number in its summary; None without a summary (it was stopped, or crashed).
        warnings: racecheck's; 0 for the other tools.
        kinds: first lines and places of its reports, without addresses, with the number of each.
        in_ours: number of reports that name a kernel of ours.
        first_report: in full, one of ours if there is any.
    """

    errors: int | None
    warnings: int
    kinds: dict[str, int] = field(default_factory=dict)
    in_ours: int = 0
    first_report: list[str] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)


def parse(output: str) -> Findings:
    """Parse the interleaved output of compute-sanitizer and its program."""
    errors, races = _ERRORS.findall(output), _RACES.findall(output)
    counted = [int(n) for n in errors] + [int(found) for _, found, _ in races]
    lines = output.splitlines()
    heads = tuple(_MARK + head for head in _HEADS)
    reports = [_report(lines, i) for i, line in enumerate(lines) if line.startswith(heads)]
    kinds = Counter(map(_kind, reports))
    ours = [report for report in reports if any(KERNELS in line for line in report)]
    return Findings(
        errors=sum(counted) if counted else None,
        warnings=sum(int(warnings) for _, _, warnings in races),
        kinds=dict(kinds.most_common(_KINDS)),
        in_ours=len(ours),
        first_report=next(iter(ours or reports), []),
        last_lines=lines[-_LAST_LINES:],
    )


def _kind(report: list[str]) -> str:
    """Return a report's message and place, without varying details."""
    where = [line.strip() for line in report[1:2] if line.strip().startswith(("at ", "and "))]
    return re.sub(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)|\[\d+ hazards?\]", "…", " ".join([report[0].strip(), *where])).strip()


def _report(lines: list[str], start: int) -> list[str]:
    """Return a report up to its empty line, at most 20 lines."""
    report: list[str] = []
    for line in lines[start : start + 20]:
        if line.rstrip() == _MARK.rstrip() or not line.startswith(_MARK):
            break
        report.append(line.removeprefix(_MARK))
    return report
