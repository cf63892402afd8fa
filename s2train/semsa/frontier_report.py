"""Shows frontiers of models: loss over density and attention time.

python -m s2train.semsa.frontier_report OUTPUT FOLDER [FOLDER …]

A folder belongs to one model (one seed). It holds frontier.json (of launch/layout_frontier.py with
layouts=FOLDER/layouts). It may hold continued/continued.json (of launch/continue_layouts.py) and times.json (of
s2train.comparison.layout_speed). Writes OUTPUT.json, OUTPUT.png and OUTPUT-spans.png, and prints a table. Run it again
when there are more results.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from s2train.command_line.program import run_command
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import output_stem, write_json
from s2train.semsa.frontier_pictures import draw_axes, draw_spans
from s2train.semsa.frontier_points import DENSE, NAMES
from s2train.semsa.frontier_results import check_same_layouts, needle_answers, read_frontier

Row = Mapping[str, Any]
_FIGURES = ("forward_ms", "forward_backward_ms")


@dataclass(frozen=True)
class Measured:
    """A kind of layout at one density, of one model.

    Its values are means over draws; answers to needles are summed.

    Attributes:
        model: number of the model's folder.
        density: share of causal positions that heads keep.
        before: change of the held-out loss without training.
        after: the same after further training, against dense that continued too.
        forward_ms, forward_backward_ms: attention of all layers.
        needle_correct, needle_trials: exact answers without training; None: not measured.
    """

    model: int
    layout: str
    budget: float
    density: float
    before: float
    after: float | None
    forward_ms: float | None
    forward_backward_ms: float | None
    needle_correct: int | None = None
    needle_trials: int | None = None


@dataclass(frozen=True)
class Model:
    """What one folder holds."""

    folder: Path
    frontier: dict[str, Any]
    continued: dict[str, Any]
    times: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Model":
        """Read a folder.

        Raises:
            ConfigError: it has no frontier, or holds results of different models or layouts.
        """
        frontier = read_frontier(folder / "frontier.json", "folders")
        continued = _read(folder / "continued" / "continued.json")
        if continued and continued["weights"] != frontier["weights"]:
            problem = "its continued runs start from another checkpoint than its frontier"
            raise ConfigError("folders", folder, problem, "Put each model's results in a separate folder.")
        times = _read(folder / "times.json")
        timed = [row for row in times.get("rows", ()) if row["length"] == frontier["seq_length"]]
        check_same_layouts(frontier, timed, folder / "times.json", "layout", "folders")
        runs = continued.get("rows", ())
        check_same_layouts(frontier, runs, folder / "continued" / "continued.json", "file", "folders")
        return cls(folder, frontier, continued, times)

    @property
    def control(self) -> float | None:
        """Held-out loss of dense attention after further training."""
        losses = [row["held_out_loss"] for row in self.continued.get("rows", ()) if row["layout"] == DENSE]
        return losses[0] if losses else None

    def dense_times(self) -> dict[str, float]:
        """Return the fastest dense attention's times; empty if none was timed."""
        length = self.frontier["seq_length"]
        every = [*self.times.get("dense", ()), *_named(self.times.get("rows", ()), f"{DENSE}.yaml")]
        timed = [row for row in every if row["length"] == length and row.get("forward_backward_ms") is not None]
        best: Row = min(timed, key=lambda row: float(row["forward_backward_ms"]), default={})
        return {name: best[name] for name in _FIGURES if name in best}

    def measured(self, number: int) -> list[Measured]:
        """Return what was measured of each layout but dense."""
        found = []
        rows = self.frontier["rows"]
        for name, budget in sorted({(row["layout"], row["budget"]) for row in rows if row["layout"] != DENSE}):
            own = [row for row in rows if (row["layout"], row["budget"]) == (name, budget)]
            correct, trials = needle_answers(own) or (None, None)
            found.append(
                Measured(
                    number,
                    name,
                    budget,
                    density=statistics.fmean(row["density"] for row in own),
                    before=statistics.fmean(row["change"] for row in own),
                    after=self._after(name, budget),
                    **{figure: self._time(own, figure) for figure in _FIGURES},
                    needle_correct=correct,
                    needle_trials=trials,
                )
            )
        return found

    def _after(self, name: str, budget: float) -> float | None:
        rows = self.continued.get("rows", ())
        losses = [row["held_out_loss"] for row in rows if (row["layout"], row["budget"]) == (name, budget)]
        return statistics.fmean(losses) - self.control if losses and self.control is not None else None

    def _time(self, own: Sequence[Row], figure: str) -> float | None:
        length = self.frontier["seq_length"]
        times = [
            timed[figure]
            for row in own
            for timed in _named(self.times.get("rows", ()), row.get("file"))
            if timed["length"] == length and timed.get(figure) is not None
        ]
        return statistics.fmean(times) if times else None


def _named(rows: Sequence[Row], file: str | None) -> list[Row]:
    return [row for row in rows if Path(row["layout"]).name == file]


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON file that may be absent."""
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("folders", path, f"is no JSON ({error})", "Remove it, or measure it again.") from error
    return content


def report(output: Path, folders: Sequence[Path], title: str | None = None) -> Table:
    """Write the report of these folders, and return its table.

    Args:
        title: of the pictures; None: the model's name.
    Raises:
        ConfigError: a folder has no frontier, or two disagree in length or steps.
    """
    stem = output_stem(output)
    models = [Model.read(folder) for folder in folders]
    for name, values in (
        ("seq_length", {model.frontier["seq_length"] for model in models}),
        ("steps", {model.continued["steps"] for model in models if model.continued}),
    ):
        if len(values) > 1:
            problem = f"they have another {name}: {', '.join(map(str, sorted(values)))}"
            raise ConfigError("folders", [str(folder) for folder in folders], problem, "Report them separately.")
    rows = [row for number, model in enumerate(models) for row in model.measured(number)]
    steps = next((model.continued["steps"] for model in models if model.continued), None)
    dense = [model.dense_times() for model in models]
    content = {
        "command": shlex.join(["python", "-m", "s2train.semsa.frontier_report", *sys.argv[1:]]),
        "model": title or models[0].frontier["model"],
        "seq_length": models[0].frontier["seq_length"],
        "samples": [model.frontier["samples"] for model in models],
        "steps": steps,
        "dense_loss": [_dense_loss(model) for model in models],
        "dense_needles": [_dense_needles(model) for model in models],
        "dense_loss_continued": [model.control for model in models],
        "dense_times": dense,
        "folders": [str(folder) for folder in folders],
        "rows": [asdict(row) for row in rows],
        "environment": environment(),
    }
    write_json(stem.with_name(f"{stem.name}.json"), content)
    draw_axes(stem.with_name(f"{stem.name}.png"), content)
    draw_spans(stem.with_name(f"{stem.name}-spans.png"), content, [_chosen(model) for model in models])
    return table(content)


def _dense_loss(model: Model) -> float:
    return next(float(row["loss"]) for row in model.frontier["rows"] if row["layout"] == DENSE)


def _dense_needles(model: Model) -> dict[str, int] | None:
    answers = needle_answers([row for row in model.frontier["rows"] if row["layout"] == DENSE])
    return None if answers is None else {"needle_correct": answers[0], "needle_trials": answers[1]}


def _chosen(model: Model) -> dict[float, Path]:
    """Return the layout files chosen by the squared effect, by density."""
    chosen = [row for row in model.frontier["rows"] if row["layout"] == "squared" and "file" in row]
    files = {row["budget"]: model.folder / "layouts" / row["file"] for row in chosen}
    return {budget: file for budget, file in files.items() if file.is_file()}


def table(content: Mapping[str, Any]) -> Table:
    """Make a table of all layouts: each model's values, separated by commas."""
    of_all = ", ".join(f"{loss:.4f}" for loss in content["dense_loss"])
    title = f"Change of the held-out loss; dense {of_all}"
    if content["steps"] is not None:
        control = ", ".join("–" if loss is None else f"{loss:.4f}" for loss in content["dense_loss_continued"])
        title += f", and {control} after {content['steps']} further steps"
    has_needles = any(content["dense_needles"])
    if has_needles:
        title += f"; exact answers to needles without training, dense {_answers(content['dense_needles'])}"
    found = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    first = ["budget", "layout", "density", "without training", *(["needles"] if has_needles else [])]
    for name in (*first, "after steps", "forward ms", "fwd + bwd ms", "×"):
        found.add_column(name, justify="left" if name == "layout" else "right")
    dense = [times.get("forward_backward_ms") for times in content["dense_times"]]
    for budget in sorted({row["budget"] for row in content["rows"]}):
        for name, label in NAMES.items():
            own = [row for row in content["rows"] if (row["layout"], row["budget"]) == (name, budget)]
            if not own:
                continue
            both = [row["forward_backward_ms"] for row in own]
            gains = [
                None if dense[row["model"]] is None or ms is None else dense[row["model"]] / ms
                for row, ms in zip(own, both, strict=True)
            ]
            found.add_row(
                f"{budget:g}",
                label,
                _joined([row["density"] for row in own], ".3f"),
                _joined([row["before"] for row in own], "+.4f"),
                *([_answers(own)] if has_needles else []),
                _joined([row["after"] for row in own], "+.4f"),
                _joined([row["forward_ms"] for row in own], ".2f"),
                _joined(both, ".2f"),
                _joined(gains, ".2f"),
            )
    return found


def _joined(values: Sequence[float | None], form: str) -> str:
    return ", ".join("–" if value is None else format(value, form) for value in values)


def _answers(rows: Sequence[Row | None]) -> str:
    scored = [row if row and row["needle_trials"] else None for row in rows]
    return ", ".join("–" if row is None else f"{row['needle_correct']}/{row['needle_trials']}" for row in scored)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="files to write, without their suffix")
    parser.add_argument("folders", type=Path, nargs="+", help="one of each model")
    parser.add_argument("--title", help="of the pictures; default: the model's name")
    given = parser.parse_args()
    run_command(lambda: Console(width=160).print(report(given.output, given.folders, given.title)))


if __name__ == "__main__":
    main()
