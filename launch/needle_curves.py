"""Draw the results of needle_recipe.py's variants.

python launch/needle_curves.py ROOT OUTPUT            writes OUTPUT.json and OUTPUT.png

Top: share of exact answers over training steps, one panel per length. Bottom: the grids. List variants that shared a
GPU during training after `--shared`: their times are omitted. Each `--beside FILE` also draws the variants of an
earlier OUTPUT.json; the new OUTPUT.json lists them with their files.
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
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from s2train.command_line.commands import text_of_setting
from s2train.environment.provenance import environment
from s2train.errors import USAGE_STATUS, ConfigError
from s2train.files import output_stem, write_json
from s2train.needles.heat_map import SCORE_COLOURS
from s2train.needles.results import Cell, load_results, results_from
from s2train.pictures.png import write_png
from s2train.study.recall import recall_curve
from s2train.training.records import last_evaluation, read_records


def read_variant(folder: Path) -> dict[str, Any]:
    """Read a variant's points, times, held-out losses, recall and grid.

    Points are [step, length, correct, trials]. Each phase, finished or not, has the seconds of its steps and the
    held-out loss of its last evaluation (nats per token). Where blocks are selected, it has the last reported recall,
    mean over layers. Seconds come from metrics.jsonl and exclude starting, evaluating and saving; the first report
    after each start includes compilation, so the median of the others replaces it. If known, the result includes the
    `seed` of all phases and, from programs.jsonl, the `wall_seconds` of each phase's programs and the command that
    started it.
    """
    points: list[tuple[int, int, int, int]] = []
    seconds: dict[str, float] = {}
    held_out: dict[str, float] = {}
    recall: dict[str, float] = {}
    for run in sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        records = read_records(run / "metrics.jsonl")
        seconds[run.name] = _seconds(records)
        if (last := last_evaluation(records)) and last["held_out_loss"] is not None:
            held_out[run.name] = last["held_out_loss"]
        if curve := recall_curve(records, points=1):
            recall[run.name] = curve[-1].mean
        for path in sorted(run.glob("needle/*/needle.json")):
            if results := load_results(path):
                points += [(results.step, length, score.correct, score.trials) for length, score in results.columns]
    grid = load_results(folder / "grid" / "needle.json")
    figures = {"seconds": seconds, "held_out_loss": held_out, **_programs(folder / "programs.jsonl")}
    seeds = {_seed(folder / phase / "config.yaml") for phase in seconds}
    seed = seeds.pop() if len(seeds) == 1 else None
    known = ({} if seed is None else {"seed": seed}) | ({"recall": recall} if recall else {})
    return {"points": sorted(points), **known, **figures, "grid": grid and asdict(grid)}


def _seed(config: Path) -> int | None:
    return OmegaConf.select(OmegaConf.load(config), "seed") if config.is_file() else None


def _programs(path: Path) -> dict[str, dict[str, Any]]:
    """Return each trained phase's total seconds and first accepted command."""
    seconds: dict[str, float] = {}
    commands: dict[str, str] = {}
    for record in read_records(path) if path.is_file() else []:
        runs = [word for word in record["command"] if word.startswith("run_dir=")]
        if runs:  # a training program
            phase = Path(text_of_setting(runs[-1])).name
            seconds[phase] = round(seconds.get(phase, 0) + record["seconds"], 3)
            if record["status"] != USAGE_STATUS:
                commands.setdefault(phase, shlex.join(["python", *record["command"]]))
    return {name: found for name, found in (("wall_seconds", seconds), ("commands", commands)) if found}


def _seconds(records: list[dict[str, Any]]) -> float:
    """Return the total time of all reported steps."""
    reports = [index for index, record in enumerate(records) if "step_time_s" in record]
    starts = [index for index, record in enumerate(records) if record.get("event") == "config"]
    steps = np.array([records[index]["step"] for index in reports])
    times = np.array([records[index]["step_time_s"] for index in reports])
    is_first = np.isin(np.arange(len(reports)), np.searchsorted(reports, starts))
    times[is_first] = np.median(times[~is_first] if not is_first.all() else times)
    begin = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else steps[0])
    return float(np.sum(np.diff(steps, prepend=begin) * times))


def label_of(name: str, variant: dict[str, Any]) -> str:
    return name if variant.get("seed") is None else f"{name} (seed {variant['seed']})"


def describe_reach(cells: list[Cell]) -> str:
    """Describe after how many layers needles reach questions; empty if unknown."""
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
    """Draw the curves and grids of variants that have them."""
    grids = {name: results_from(variant["grid"]) for name, variant in variants.items() if variant["grid"]}
    figure = Figure(figsize=(3.2 * max(2, len(variants)), 7), dpi=140, layout="constrained")
    lengths = sorted({point[1] for variant in variants.values() for point in variant["points"]})
    counts = [count for count in (len(lengths), len(grids)) if count]  # of panels in each row
    rows = figure.subfigures(max(1, len(counts)), 1, squeeze=False)[:, 0]
    by_row = [row.subplots(1, count, squeeze=False)[0] for row, count in zip(rows, counts, strict=False)]
    panels = (axes for row in by_row for axes in row)
    for length in lengths:
        axes = next(panels)
        for name, variant in variants.items():
            points = [point for point in variant["points"] if point[1] == length]
            if not points:
                continue
            shares = [100 * correct / trials for _, _, correct, trials in points]
            seconds = f", {sum(variant['seconds'].values()):.0f} s" if variant["seconds"] else ""
            axes.plot(
                [point[0] for point in points],
                shares,
                marker="o",
                markersize=3,
                label=label_of(name, variant) + seconds,
            )
        axes.set_title(f"{length / 1024:g}k tokens", fontsize=9)
        axes.set_xlabel("training steps of all phases", fontsize=8)
        axes.set_ylabel("exact answers (%)", fontsize=8)
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 103)
        axes.legend(fontsize=7)
    for name, grid in grids.items():
        axes = next(panels)
        share = {(cell.length, cell.depth): cell.correct / cell.trials for cell in grid.asked}
        values = [[share.get((length, depth), np.nan) for length in grid.lengths] for depth in grid.depths]
        axes.imshow(values, cmap=SCORE_COLOURS, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(grid.lengths)), [f"{length / 1024:g}k" for length in grid.lengths], fontsize=7)
        axes.set_yticks(range(len(grid.depths)), [f"{100 * depth:.0f} %" for depth in grid.depths], fontsize=7)
        label = label_of(name, variants[name])
        title = f"{label}: {100 * grid.score.share:.1f} %" if grid.score else label
        axes.set_title(f"{title}\n{describe_reach(grid.asked)}".rstrip(), fontsize=8)
    write_png(figure, path)


def read_earlier(file: Path) -> dict[str, dict[str, Any]]:
    """Read the variants of an OUTPUT.json.

    Raises:
        OSError, ValueError, KeyError, TypeError, ArithmeticError: it is invalid, or can't be drawn.
    """
    variants = json.loads(file.read_text(encoding="utf-8"))["variants"]
    if not isinstance(variants, dict):
        raise TypeError(variants)
    for variant in variants.values():  # checks what `draw` uses
        _ = [step + length + correct / trials for step, length, correct, trials in variant["points"]]
        _ = sum({**variant["seconds"]}.values())
        _ = variant["grid"] and results_from(variant["grid"]).columns
    return variants


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--shared", nargs="*", default=[], metavar="VARIANT", help="variants trained with others on one GPU"
    )
    parser.add_argument(
        "--beside", action="append", type=Path, default=[], metavar="FILE", help="earlier OUTPUT.json; may be repeated"
    )
    given = parser.parse_args()
    if not given.root.is_dir():
        parser.error(f"{given.root}: no such folder; `launch/needle_recipe.py train` creates it")
    try:
        stem = output_stem(given.output, "OUTPUT")
    except ConfigError as error:
        parser.error(str(error))
    table, picture = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    there = [str(path) for path in (table, picture) if path.exists()]
    if there:
        parser.error(f"{there[0]} exists and is not overwritten: name another OUTPUT, or move it away")
    folders = [path for path in sorted(given.root.iterdir()) if any(path.glob("*/metrics.jsonl"))]
    variants = {folder.name: read_variant(folder) for folder in folders}
    if not variants and not given.beside:
        parser.error(f"{given.root}: no variant in it has metrics.jsonl; `launch/needle_recipe.py train` writes it")
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
            parser.error(f"--beside {file}: not an OUTPUT.json of this program")
        if twice := sorted(drawn.keys() & earlier.keys()):
            parser.error(f"--beside {file}: {', '.join(twice)} occurs twice; move the folder or omit the file")
        drawn |= earlier
        beside |= dict.fromkeys(earlier, str(file))
    draw(drawn, picture)
    own = {"command": shlex.join(["python", *sys.argv]), **environment(), "variants": variants}
    content = own | ({"beside": beside} if beside else {})
    write_json(table, content)


if __name__ == "__main__":
    main()
