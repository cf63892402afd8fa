"""Finds by which settings a phase's runs were evaluated otherwise."""

from collections.abc import Mapping
from typing import Any

# Of needle tasks: a run's own, and what changes no answer but by rounding.
_OF_THE_RUN = ("weights", "layout", "attention_backend")


def probe_settings(probes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run's probes, by name.

    Args:
        probes: content of RUN-probes.json.
    """
    return {
        "seed": probes.get("seed"),
        "lengths": [row["length"] for row in probes["completion"]],
        # a length for which the text holds too few has fewer
        "trials": max((row["with_definition"]["trials"] for row in probes["completion"]), default=0),
        "sequences": probes["recurrence"].get("sequences"),
    }


def needle_settings(needles: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of a run's needle tasks, by name.

    Each has the values of all tasks.

    Args:
        needles: content of RUN-needles.json.
    """
    values: dict[str, dict[str, Any]] = {}
    for task, found in needles["tasks"].items():
        given = {name: value for name, value in found.get("settings", {}).items() if name not in _OF_THE_RUN}
        grid = {f"{name}s": sorted({cell[name] for cell in found["cells"]}) for name in ("length", "depth")}
        trials = {"trials": sorted({cell["trials"] for cell in found["cells"]})}
        for name, value in (given | grid | trials).items():
            values.setdefault(name, {})[task] = value
    return values


def differences(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Name settings that differ, each with its rarest value's runs.

    Files of earlier versions lack some; they are not compared by those.

    Args:
        settings: by run.
    """
    said = []
    for name in sorted({name for own in settings.values() for name in own}):
        given = {run: repr(own[name]) for run, own in settings.items() if own.get(name) is not None}
        if (found := rarest(given)) is not None:
            said.append(f"{name} ({', '.join(found[1])})")
    return said


def rarest(values: Mapping[str, str]) -> tuple[str, list[str]] | None:
    """Return the value that the fewest runs have, and these runs.

    None if all have the same value.

    Args:
        values: by run.
    """
    by_value: dict[str, list[str]] = {}
    for run, value in values.items():
        by_value.setdefault(value, []).append(run)
    return min(by_value.items(), key=lambda item: len(item[1])) if len(by_value) > 1 else None
