"""Pictures of needle_recipe.py's variants: `python launch/needle_curves.py ROOT OUTPUT` writes OUTPUT.json and .png.

Above, the share of exact answers over training steps, a panel a length; below, the grids. Variants that shared their
GPU while they trained are named after `--shared`: their times are left out. `--beside` draws those of earlier
OUTPUT.json too; in the new one they are named with their files.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s2train.comparison.runs import environment
from s2train.evaluation.pictures import SCORE_COLOURS
from s2train.evaluation.results import load_results, results_from
from s2train.training.plots import read_curves, read_records


def read_variant(folder: Path) -> dict[str, Any]:
    """A variant's points [step, length, correct, trials], of each phase the seconds that its steps took and the
    held-out loss at its end (nats a token), and its grid.

    Seconds are from metrics.jsonl: without starting, evaluating and saving. The first report after each start has
    compilation in it: the median of the others counts in its place.
    """
    points: list[tuple[int, int, int, int]] = []
    seconds: dict[str, float] = {}
    held_out: dict[str, float] = {}
    for run in sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        seconds[run.name] = _seconds(read_records(run / "metrics.jsonl"))
        if losses := read_curves(run / "metrics.jsonl").held_out:
            held_out[run.name] = losses[max(losses)]
        for path in sorted(run.glob("needle/*/needle.json")):
            if results := load_results(path):
                points += [(results.step, length, score.correct, score.trials) for length, score in results.columns]
    grid = load_results(folder / "grid" / "needle.json")
    losses_and_seconds = {"seconds": seconds, "held_out_loss": held_out}
    return {"points": sorted(points), **losses_and_seconds, "grid": grid and asdict(grid)}


def _seconds(records: list[dict[str, Any]]) -> float:
    """What all steps reported took."""
    reports = [index for index, record in enumerate(records) if "step_time_s" in record]
    starts = [index for index, record in enumerate(records) if record.get("event") == "config"]
    steps = np.array([records[index]["step"] for index in reports])
    times = np.array([records[index]["step_time_s"] for index in reports])
    is_first = np.isin(np.arange(len(reports)), np.searchsorted(reports, starts))
    times[is_first] = np.median(times[~is_first] if not is_first.all() else times)
    begin = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    return float(np.sum(np.diff(steps, prepend=begin) * times))


def draw(variants: dict[str, dict[str, Any]], path: Path) -> None:
    """Curves of all variants, and a heat map of each grid."""
    grids = {name: results_from(variant["grid"]) for name, variant in variants.items() if variant["grid"]}
    figure = Figure(figsize=(3.2 * max(2, len(variants)), 7), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1)
    lengths = sorted({point[1] for variant in variants.values() for point in variant["points"]})
    for axes, length in zip(np.atleast_1d(above.subplots(1, max(1, len(lengths)))), lengths, strict=False):
        for name, variant in variants.items():
            points = [point for point in variant["points"] if point[1] == length]
            if not points:
                continue
            shares = [100 * correct / trials for _, _, correct, trials in points]
            seconds = f", {sum(variant['seconds'].values()):.0f} s" if variant["seconds"] else ""
            axes.plot([point[0] for point in points], shares, marker="o", markersize=3, label=name + seconds)
        axes.set_title(f"{length / 1024:g}k tokens", fontsize=9)
        axes.set_xlabel("training steps of all phases", fontsize=8)
        axes.set_ylabel("exact answers (%)", fontsize=8)
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 103)
        axes.legend(fontsize=7)
    for axes, (name, grid) in zip(np.atleast_1d(below.subplots(1, max(1, len(grids)))), grids.items(), strict=False):
        share = {(cell.length, cell.depth): cell.correct / cell.trials for cell in grid.asked}
        values = [[share.get((length, depth), np.nan) for length in grid.lengths] for depth in grid.depths]
        axes.imshow(values, cmap=SCORE_COLOURS, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(grid.lengths)), [f"{length / 1024:g}k" for length in grid.lengths], fontsize=7)
        axes.set_yticks(range(len(grid.depths)), [f"{100 * depth:.0f} %" for depth in grid.depths], fontsize=7)
        axes.set_title(f"{name}: {100 * grid.score.share:.1f} %" if grid.score else name, fontsize=9)
    figure.savefig(path, format="png")


def main() -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shared", nargs="*", default=[], metavar="VARIANT", help="trained beside others on one GPU")
    parser.add_argument("--beside", nargs="*", type=Path, default=[], metavar="FILE", help="earlier OUTPUT.json")
    given = parser.parse_args()
    if not given.root.is_dir():
        parser.error(f"{given.root}: no such folder; `launch/needle_recipe.py train` makes it")
    there = [str(path) for path in map(given.output.with_suffix, (".json", ".png")) if path.exists()]
    if there:
        parser.error(f"{there[0]} is there, and not overwritten: name another OUTPUT, or move it away")
    folders = [path for path in sorted(given.root.iterdir()) if any(path.glob("*/metrics.jsonl"))]
    variants = {folder.name: read_variant(folder) for folder in folders}
    for name in given.shared:
        variants[name]["seconds"] = {}
    drawn, beside = dict(variants), {}
    for file in given.beside:
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))["variants"]
        except (OSError, ValueError, KeyError, TypeError):
            parser.error(f"--beside {file}: no OUTPUT.json of this program")
        if twice := sorted(drawn.keys() & earlier.keys()):
            parser.error(f"--beside {file}: {', '.join(twice)} is there already; move the folder or leave the file out")
        drawn |= earlier
        beside |= dict.fromkeys(earlier, str(file))
    draw(drawn, given.output.with_suffix(".png"))
    told = {"command": shlex.join(["python", *sys.argv]), **environment(), "variants": variants}
    content = told | ({"beside": beside} if beside else {})
    given.output.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
