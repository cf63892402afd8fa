"""Draw needle evaluations side by side.

python launch/demo_picture.py OUTPUT.png NAME=NEEDLE.json … --least 0.75

Each NEEDLE.json is what launch/needle.py wrote of one checkpoint, and NAME the title of its panel. The program exits
with status 1, after drawing, if the last of them scores less than `--least`, a share of exact answers.
"""

import argparse
import sys
from pathlib import Path

import _surroundings  # noqa: F401 (prints why the rest can't start)

import numpy as np
from matplotlib.figure import Figure

from s2train.needles.heat_map import SCORE_COLOURS, percent
from s2train.needles.results import NeedleResults, load_results
from s2train.pictures.png import write_png


def draw(evaluations: dict[str, NeedleResults], path: Path) -> None:
    """Draw a heat map of each evaluation as a PNG.

    It shows exact answers in per cent over length and depth. The evaluation's key is its title.
    """
    figure = Figure(figsize=(1.6 + 3.4 * len(evaluations), 3.4), dpi=160, layout="constrained")
    panels = figure.subplots(1, len(evaluations), squeeze=False)[0]
    for axes, (name, results) in zip(panels, evaluations.items(), strict=True):
        shares = {(cell.length, cell.depth): cell.score.share for cell in results.asked}
        values = np.array([[shares.get((n, d), np.nan) for n in results.lengths] for d in results.depths])
        image = axes.imshow(values, cmap=SCORE_COLOURS, vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(values):
            axes.text(column, row, "" if np.isnan(share) else percent(share), ha="center", va="center", fontsize=9)
        axes.set_xticks(range(len(results.lengths)), [str(length) for length in results.lengths])
        axes.set_yticks(range(len(results.depths)), [f"{100 * depth:g} %" for depth in results.depths])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("length (tokens)")
        score = results.score
        outcome = f"{percent(score.share)} % of {score.trials} exact" if score else "not evaluated"
        axes.set_title(f"{name}: {outcome}", fontsize=9)
    panels[0].set_ylabel("depth of the needle")
    bar = figure.colorbar(image, ax=panels, ticks=[0, 0.5, 1], pad=0.01)
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    figure.suptitle(
        "Needle retrieval: seven digits by their key, both never trained on", fontweight="bold", fontsize=11
    )
    write_png(figure, path)


def main() -> None:
    """Draw, then judge the last evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT.png")
    parser.add_argument("needles", nargs="+", metavar="NAME=NEEDLE.json")
    parser.add_argument("--least", type=float, required=True, help="share of exact answers that the last one must have")
    given = parser.parse_args()
    evaluations = {}
    for panel in given.needles:
        name, _, path = panel.partition("=")
        results = load_results(Path(path)) if path else None
        if results is None or results.score is None:
            parser.error(f"{panel}: not NAME=FILE with an evaluation by launch/needle.py in FILE")
        evaluations[name] = results
    draw(evaluations, given.output)
    score = results.score
    outcome = f"{name}: {score.correct} of {score.trials} needles retrieved ({percent(score.share)} %)"
    if score.share < given.least:
        sys.exit(f"error: {outcome}; at least {100 * given.least:g} % were expected")
    print(f"{outcome}, at least {100 * given.least:g} % were expected | picture {given.output}")


if __name__ == "__main__":
    main()
