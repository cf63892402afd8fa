"""Reads a frontier's file; shows it as a table and a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich import box
from rich.table import Table

from s2train.errors import ConfigError
from s2train.files import reading
from s2train.pictures.png import write_png
from s2train.pictures.style import GREY, Sheet, plain
from s2train.semsa.frontier_points import DENSE, NAMES
from s2train.semsa.pictures import curve

_ROUNDING = 1e-9  # of densities, which are computed in two ways


def read_frontier(path: Path, setting: str) -> dict[str, Any]:
    """Read a file of launch/layout_frontier.py, finished or not.

    Raises:
        ConfigError: on `setting`; there is no such file, or it is none of these.
    """
    remedy = "Name a .json file that launch/layout_frontier.py wrote."
    if not path.exists():
        raise ConfigError(setting, path, "there is no such file", remedy)
    with reading(setting, path, "is no frontier", remedy):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("no JSON object")
        if missing := {"weights", "settings", "seq_length", "rows", "finished"}.difference(content):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return content


def check_same_layouts(
    frontier: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], path: Path, name_of: str, setting: str
) -> None:
    """Check that results are of the frontier's layouts, by their densities.

    A frontier that is measured again by another profile has other layouts under the same names.

    Args:
        rows: results, each with its density and, in `name_of`, the name of its layout file.
        path: of these results.
    Raises:
        ConfigError: on `setting`; a layout has another density in the frontier.
    """
    densities = {row.get("file"): row["density"] for row in frontier["rows"]}
    for row in rows:
        name = Path(row.get(name_of) or "").name
        if name in densities and abs(densities[name] - row["density"]) > _ROUNDING:
            problem = f"it has results of another {name}: density {row['density']:.4f}, not {densities[name]:.4f}"
            raise ConfigError(setting, path, problem, "Move the file away, and measure again.")


def frontier_table(content: dict[str, Any]) -> Table:
    """Return the changes of the loss by layout and density.

    Exact answers to needles stand beside them where they were measured, summed over draws.
    """
    title = f"Change of the held-out loss (dense {content['dense_loss']:.4f})"
    if answers := needle_answers([row for row in content["rows"] if row["layout"] == DENSE]):
        title += f" and exact answers to needles (dense {answers[0]}/{answers[1]})"
    title += ", without training"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    budgets = sorted({row["budget"] for row in content["rows"] if row["layout"] != DENSE})
    table.add_column("density")
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right")
    for name, label in NAMES.items():
        cells = []
        for budget in budgets:
            rows = [row for row in content["rows"] if row["layout"] == name and row["budget"] == budget]
            own, answers = [row["change"] for row in rows], needle_answers(rows)
            spread = f" ({min(own):+.3f} to {max(own):+.3f})" if len(own) > 1 else ""
            needles = f", {answers[0]}/{answers[1]}" if answers else ""
            cells.append(f"{sum(own) / len(own):+.4f}{spread}{needles}" if own else "–")
        table.add_row(label, *cells)
    return table


def needle_answers(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Sum exact answers and trials; None if they were not measured."""
    if not rows or not all(row.get("needle_trials") for row in rows):
        return None
    return sum(row["needle_correct"] for row in rows), sum(row["needle_trials"] for row in rows)


def draw_frontier(path: Path, content: dict[str, Any], title: str) -> None:
    """Draw the change of the loss over the density.

    A second panel has the share of exact answers to needles, where they were measured.
    """
    rows = [
        {**row, "needles": row["needle_correct"] / row["needle_trials"]} if row.get("needle_trials") else row
        for row in content["rows"]
    ]
    scored = [row for row in rows if "needles" in row]
    sheet = Sheet(14.0 if scored else 7.4, 4.8)
    against = "loss and needles" if scored else "loss"
    sheet.text(0.45, 0.2, f"{title}: {against} against density, without training", size=12, bold=True)
    tokens, dense = content["seq_length"], content["dense_loss"]
    sheet.text(0.45, 0.5, f"{tokens:,} tokens, {content['samples']} held-out samples; dense {dense:.4f}", colour=GREY)
    axes = sheet.axes(0.85, 0.9, 6.2, 3.3)
    _draw_curves(axes, rows, "change")
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_ylabel("change of the held-out loss (nats per token)", fontsize=8.5, color=GREY)
    axes.legend(frameon=False, fontsize=8)
    if scored:
        lengths = ", ".join(f"{length:,}" for length in content["needles"]["lengths"])
        answers = needle_answers([row for row in scored if row["layout"] == DENSE])
        second = sheet.axes(7.5, 0.9, 6.2, 3.3)
        _draw_curves(second, scored, "needles")
        if answers:
            correct, trials = answers
            sheet.text(7.5, 0.5, f"needles in {lengths} tokens; dense {correct} of {trials}", colour=GREY)
            second.axhline(correct / trials, color="#BBBBBB", linewidth=0.8, zorder=0)
        second.set_ylim(-0.03, 1.03)
        second.set_ylabel("share of exact answers to needles", fontsize=8.5, color=GREY)
    write_png(sheet.figure, path)


def _draw_curves(axes: Axes, rows: Sequence[Mapping[str, Any]], y: str) -> None:
    """Draw one curve for each kind of layout, over the density."""
    for number, (name, label) in enumerate(NAMES.items()):
        own = [row for row in rows if row["layout"] == name]
        if own:
            curve(axes, own, "density", y, label, number, "." if name == "random" else "o-")
    axes.set_xlabel("density: share of causal positions that heads keep", fontsize=8.5, color=GREY)
    plain(axes, 8)
