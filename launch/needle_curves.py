"""Pictures of needle_recipe.py's variants: `python launch/needle_curves.py ROOT OUTPUT` writes OUTPUT.json and .png.

Above, the share of exact answers over training steps, a panel a length; below, the grids. Variants that shared their
GPU while they trained are named after `--shared`: their times are left out. Each `--beside FILE` draws those of an
earlier OUTPUT.json too; in the new one they are named with their files.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _surroundings  # noqa: F401 (prints why the rest can't start)

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from s2train.environment.provenance import environment
from s2train.errors import USAGE_STATUS, ConfigError
from s2train.files import output_stem
from s2train.needles.heat_map import SCORE_COLOURS
from s2train.needles.results import Cell, load_results, results_from
from s2train.training.records import read_records


def read_variant(folder: Path) -> dict[str, Any]:
    """A variant's points [step, length, correct, trials], of each phase the seconds that its steps took and the
    held-out loss of its last evaluation (nats a token), which a phase under way has too; and its grid.

    Seconds are from metrics.jsonl: without starting, evaluating and saving. The first report after each start has
    compilation in it: the median of the others counts in its place. Where they are known: the `seed` of all phases;
    and of each phase the `wall_seconds` of its programs, and the command that began it, from programs.jsonl.
    """
    points: list[tuple[int, int, int, int]] = []
    seconds: dict[str, float] = {}
    held_out: dict[str, float] = {}
    for run in sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        records = read_records(run / "metrics.jsonl")
        seconds[run.name] = _seconds(records)
        if losses := [record["held_out_loss"] for record in records if record.get("held_out_loss") is not None]:
            held_out[run.name] = losses[-1]
        for path in sorted(run.glob("needle/*/needle.json")):
            if results := load_results(path):
                points += [(results.step, length, score.correct, score.trials) for length, score in results.columns]
    grid = load_results(folder / "grid" / "needle.json")
    figures = {"seconds": seconds, "held_out_loss": held_out, **_programs(folder / "programs.jsonl")}
    seeds = {_seed(folder / phase / "config.yaml") for phase in seconds}
    seed = seeds.pop() if len(seeds) == 1 else None
    told = {} if seed is None else {"seed": seed}
    return {"points": sorted(points), **told, **figures, "grid": grid and asdict(grid)}


def _seed(config: Path) -> int | None:
    return OmegaConf.select(OmegaConf.load(config), "seed") if config.is_file() else None


def _programs(path: Path) -> dict[str, dict[str, Any]]:
    """Of each phase trained the seconds of all its programs, and the first command that was not refused."""
    seconds: dict[str, float] = {}
    commands: dict[str, str] = {}
    for record in read_records(path) if path.is_file() else []:
        runs = [word for word in record["command"] if word.startswith("run_dir=")]
        if runs:  # a training's
            phase = Path(runs[-1]).name
            seconds[phase] = round(seconds.get(phase, 0) + record["seconds"], 3)
            if record["status"] != USAGE_STATUS:
                commands.setdefault(phase, shlex.join(["python", *record["command"]]))
    return {name: found for name, found in (("wall_seconds", seconds), ("commands", commands)) if found}


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


def _label(name: str, variant: dict[str, Any]) -> str:
    return name if variant.get("seed") is None else f"{name} (seed {variant['seed']})"


def reach_told(cells: list[Cell]) -> str:
    """Through how many of the last layers the needles of `cells` reach their questions; empty if that is not known."""
    layers = sorted({cell.reach.from_last for cell in cells if cell.reach})
    reached = [count for count in layers if count >= 0]
    if not layers:
        return ""
    if not reached:
        return "needle → question: out of reach"
    span = f"{reached[0]}" if len(reached) == 1 else f"{reached[0]} to {reached[-1]}"
    never = ", or never" if len(reached) < len(layers) else ""
    return f"needle → question: last {span} layer{'' if span == '1' else 's'}{never}"


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
            axes.plot(
                [point[0] for point in points], shares, marker="o", markersize=3, label=_label(name, variant) + seconds
            )
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
        label = _label(name, variants[name])
        title = f"{label}: {100 * grid.score.share:.1f} %" if grid.score else label
        axes.set_title(f"{title}\n{reach_told(grid.asked)}".rstrip(), fontsize=8)
    figure.savefig(path, format="png")


def read_earlier(file: Path) -> dict[str, dict[str, Any]]:
    """The variants of an OUTPUT.json.

    Raises:
        OSError, ValueError, KeyError, TypeError, ArithmeticError: it is none, or can't be drawn.
    """
    variants = json.loads(file.read_text(encoding="utf-8"))["variants"]
    if not isinstance(variants, dict):
        raise TypeError(variants)
    for variant in variants.values():  # what `draw` takes of each
        _ = [step + length + correct / trials for step, length, correct, trials in variant["points"]]
        _ = sum({**variant["seconds"]}.values())
        _ = variant["grid"] and results_from(variant["grid"]).columns
    return variants


def main() -> None:
    """The command line's entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shared", nargs="*", default=[], metavar="VARIANT", help="trained beside others on one GPU")
    parser.add_argument(
        "--beside", action="append", type=Path, default=[], metavar="FILE", help="earlier OUTPUT.json; may come again"
    )
    given = parser.parse_args()
    if not given.root.is_dir():
        parser.error(f"{given.root}: no such folder; `launch/needle_recipe.py train` makes it")
    try:
        stem = output_stem(given.output, "OUTPUT")
    except ConfigError as error:
        parser.error(str(error))
    table, picture = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    there = [str(path) for path in (table, picture) if path.exists()]
    if there:
        parser.error(f"{there[0]} is there, and not overwritten: name another OUTPUT, or move it away")
    folders = [path for path in sorted(given.root.iterdir()) if any(path.glob("*/metrics.jsonl"))]
    variants = {folder.name: read_variant(folder) for folder in folders}
    for name in given.shared:
        if name not in variants:
            parser.error(
                f"--shared {name}: not among the variants of {given.root}: {', '.join(variants) or 'it has none'}"
            )
        variants[name]["seconds"] = {}
        variants[name].pop("wall_seconds", None)
    drawn, beside = dict(variants), {}
    for file in given.beside:
        try:
            earlier = read_earlier(file)
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError):
            parser.error(f"--beside {file}: no OUTPUT.json of this program")
        if twice := sorted(drawn.keys() & earlier.keys()):
            parser.error(f"--beside {file}: {', '.join(twice)} is there already; move the folder or leave the file out")
        drawn |= earlier
        beside |= dict.fromkeys(earlier, str(file))
    draw(drawn, picture)
    told = {"command": shlex.join(["python", *sys.argv]), **environment(), "variants": variants}
    content = told | ({"beside": beside} if beside else {})
    table.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
