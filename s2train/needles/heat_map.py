"""Shows needle results as a heat map and a table."""

import math
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.table import Table

from s2train.needles.results import Cell, NeedleResults
from s2train.pictures.png import write_png

# Vermilion, pale yellow, bluish green of Okabe and Ito's palette, distinguishable with any kind of colour vision
SCORE_COLOURS = LinearSegmentedColormap.from_list("score", ["#D55E00", "#F7EEC0", "#009E73"])
NOT_EVALUATED = "#DDDDDD"


def draw_heat_map(results: NeedleResults, path: Path, title: str = "Needle retrieval") -> None:
    """Draw exact answers by length and depth, as a PNG.

    Cells that were not evaluated are grey. If the layout is known, a small label below the score shows how many of the
    last layers are needed to carry the needle to the question.
    """
    lengths, depths, scores = _score_matrix(results)
    width = max(2.6 + 0.85 * len(lengths), 0.115 * len(title))
    figure = Figure(figsize=(width, 2.0 + 0.55 * len(depths)), dpi=160, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor(NOT_EVALUATED)
    image = axes.imshow(scores, cmap=SCORE_COLOURS, vmin=0, vmax=1, aspect="auto")
    cells = {(cell.length, cell.depth): cell for cell in results.asked}
    for (row, column), score in np.ndenumerate(scores):
        if not np.isnan(score):
            layers = _layers(cells[lengths[column], depths[row]])
            height = row - 0.14 if layers else row
            axes.text(column, height, percent(score), ha="center", va="center", fontsize=10)
            axes.text(column, row + 0.26, layers, ha="center", va="center", fontsize=6.5, color="#333333")
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axes.set_xticks(np.arange(1, len(lengths)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(depths)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    parts = [f"step {results.step:,}"]
    if (score := results.score) is not None:
        parts.append(f"{percent(score.share, 1)} % of {score.trials:,} answers exact")
    length = results.effective_length
    reached = f"effective length {_tokens(length)}" if length else "no effective length"
    subtitle = f"{' · '.join(parts)}\n{reached} ({100 * results.threshold:g} % or more)"
    axes.set_title(subtitle, fontsize=9, color="#555555")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], pad=0.02)
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    write_png(figure, path)


def score_table(results: NeedleResults) -> Table:
    """Format the results as a table.

    A cell shows the percentage of exact answers. If that is below 100, it also shows the percentages of values that the
    text contains and of correct letters and digits.
    """
    caption = (
        "· n: the last n layers are needed to carry the needle to the question"
        if any(_layers(cell) for cell in results.asked)
        else None
    )
    scores = [score for score in (results.score, results.contained) if score is not None]
    in_all = f": {' / '.join(percent(score.share, 1) for score in scores)} in all" if scores else ""
    found = " / values that the text contains, %" if results.contained else ""
    title = f"Exact answers, %{found} (correct letters and digits, %){in_all}"
    table = Table(title=title, caption=caption)
    lengths, depths, _ = _score_matrix(results)
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(_tokens(length), justify="right")
    cells = {(cell.length, cell.depth): cell for cell in results.asked}
    for depth in depths:
        table.add_row(f"{100 * depth:g} %", *(_figures(cells.get((length, depth))) for length in lengths))
    return table


def _figures(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    exact = percent(cell.score.share)
    found = "" if cell.contained is None else f" / {percent(cell.contained.share)}"
    figures = exact if cell.correct == cell.trials else f"{exact}{found} ({100 * cell.character_accuracy:.0f})"
    if cell.reach is None:
        return figures
    return f"{figures} · {cell.reach.from_last}" if cell.reach.from_last >= 0 else f"{figures} · never"


def _layers(cell: Cell) -> str:
    """Describe how many layers away the needle is.

    Empty if that is not known.
    """
    if cell.reach is None:
        return ""
    count = cell.reach.from_last
    return "out of reach" if count < 0 else f"{count} layer{'' if count == 1 else 's'}"


def _score_matrix(results: NeedleResults) -> tuple[list[int], list[float], np.ndarray]:
    """Lengths, depths and shares of exact answers.

    The shares are float64 [depths, lengths], NaN if not evaluated.
    """
    lengths, depths = sorted(results.lengths), sorted(results.depths)
    scores = np.full((len(depths), len(lengths)), np.nan)
    for cell in results.asked:
        scores[depths.index(cell.depth), lengths.index(cell.length)] = cell.score.share
    return lengths, depths, scores


def percent(share: float, digits: int = 0) -> str:
    """Format a share in per cent, rounded down.

    So 100 means all.
    """
    return f"{math.floor(100 * 10**digits * share + 1e-9) / 10**digits:.{digits}f}"


def _tokens(count: int) -> str:
    """Format a token count: 131072 as 128k, 1000 as 1000."""
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)
