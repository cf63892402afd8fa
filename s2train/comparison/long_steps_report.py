"""Shows the times of long steps as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Table

from s2train.comparison.long_steps import Row
from s2train.pictures.png import write_png


def best_dense(rows: Sequence[Row], length: int) -> Row | None:
    """Find the fastest dense variant at a length, or None."""
    dense = [row for row in rows if row.seq_length == length and not row.is_hybrid]
    return min(dense, key=lambda row: row.step_s, default=None)


def gain(row: Row, over: Row | None) -> float | None:
    """Speedup of a hybrid's step over another.

    None for a dense row, or if the other is missing.
    """
    return over.step_s / row.step_s if row.is_hybrid and over is not None else None


def table(rows: Sequence[Row]) -> Table:
    """Make a table of all rows, with hybrids' speedups over dense variants."""
    dense = list(dict.fromkeys(row.way for row in rows if not row.is_hybrid))
    found = Table(
        *("tokens", "variant", "layers", "recompute", "s/step", "planned", "tokens/s", "MFU", "peak GiB", "planned"),
        *("over best dense", *(f"over {way.removeprefix('dense ')}" for way in dense)),
        box=box.SIMPLE_HEAD,
    )
    for row in sorted(rows, key=lambda row: row.seq_length):
        at = {other.way: other for other in rows if other.seq_length == row.seq_length}
        gains = [gain(row, best_dense(rows, row.seq_length)), *(gain(row, at.get(way)) for way in dense)]
        found.add_row(
            f"{row.seq_length:,}",
            row.way,
            str(row.layers),
            row.recompute,
            f"{row.step_s:.3f}",
            "" if row.planned_s is None else f"{row.planned_s:.3f}",
            f"{row.tokens_per_s:,.0f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.peak_gib:.1f}" if row.peak_gib else "",
            f"{row.planned_gib:.1f}" if row.planned_gib else "",
            *("" if each is None else f"{each:.2f}×" for each in gains),
        )
    return found


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw tokens/s by length as bars, one per variant.

    The number above a hybrid is its speedup over the best dense variant.
    """
    lengths = sorted({row.seq_length for row in rows})
    variants = list(dict.fromkeys(row.way for row in rows))
    figure = Figure(figsize=(3.2 * len(lengths) + 0.8, 3.6), dpi=130)
    axes = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axis, length in zip(axes, lengths, strict=True):
        of_length = {row.way: row for row in rows if row.seq_length == length}
        for place, variant in enumerate(variants):
            if (row := of_length.get(variant)) is None:
                continue
            axis.bar(place, row.tokens_per_s, width=0.7, color=f"C{place}", label=variant)
            times = gain(row, best_dense(rows, length))
            text = "" if times is None else f"{times:.2f}×"
            axis.annotate(text, (place, row.tokens_per_s), ha="center", va="bottom", fontsize=9)
        layers = next(iter(of_length.values())).layers
        axis.set_title(f"{length:,} tokens, {layers} layers", fontsize=10)
        axis.set_xticks([])
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(top=1.12 * max(row.tokens_per_s for row in of_length.values()))
    axes[0].set_ylabel("tokens/s")
    handles = [Patch(color=f"C{place}") for place in range(len(variants))]
    columns = min(len(variants), 4)
    figure.legend(handles, variants, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    figure.suptitle(f"{title} (above a bar: speedup over the best dense)", fontsize=11)
    figure.tight_layout(rect=(0, 0.07 * -(-len(variants) // columns), 1, 1))
    write_png(figure, path)
