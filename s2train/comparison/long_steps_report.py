"""Long steps as a table and a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.ticker import EngFormatter
from rich import box
from rich.table import Table

from s2train.comparison.long_steps import Row
from s2train.files import replacing


def table(rows: Sequence[Row]) -> Table:
    """One line a row, with the hybrid's gain over each dense one."""
    found = Table(
        *("tokens", "way", "layers", "recompute", "s/step", "tokens/s", "MFU", "peak GiB", "planned", "hybrid's gain"),
        box=box.SIMPLE_HEAD,
    )
    hybrid = {row.seq_length: row.step_s for row in rows if row.way == "hybrid"}
    for row in sorted(rows, key=lambda row: row.seq_length):
        gain = row.step_s / hybrid[row.seq_length] if row.seq_length in hybrid and row.way != "hybrid" else None
        found.add_row(
            f"{row.seq_length:,}",
            row.way,
            str(row.layers),
            row.recompute,
            f"{row.step_s:.3f}",
            f"{row.tokens_per_s:,.0f}",
            "" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.peak_gib:.1f}" if row.peak_gib else "",
            f"{row.planned_gib:.1f}" if row.planned_gib else "",
            "" if gain is None else f"{gain:.2f}×",
        )
    return found


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of tokens/s by length, one for each way; above each dense one the hybrid's gain over it."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({row.seq_length for row in rows})
    ways = list(dict.fromkeys(row.way for row in rows))
    figure, axes = plt.subplots(1, len(lengths), figsize=(3.2 * len(lengths) + 0.8, 3.6), squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        of_length = {row.way: row for row in rows if row.seq_length == length}
        for place, way in enumerate(ways):
            if (row := of_length.get(way)) is None:
                continue
            axis.bar(place, row.tokens_per_s, width=0.7, color=f"C{place}", label=way)
            gain = of_length["hybrid"].tokens_per_s / row.tokens_per_s if "hybrid" in of_length else 1.0
            text = "" if way == "hybrid" else f"{gain:.2f}×"
            axis.annotate(text, (place, row.tokens_per_s), ha="center", va="bottom", fontsize=9)
        layers = next(iter(of_length.values())).layers
        axis.set_title(f"{length:,} tokens, {layers} layers", fontsize=10)
        axis.set_xticks([])
        axis.yaxis.set_major_formatter(EngFormatter(sep=""))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(top=1.12 * max(row.tokens_per_s for row in of_length.values()))
    axes[0][0].set_ylabel("tokens/s")
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{place}") for place in range(len(ways))]
    figure.legend(handles, ways, loc="lower center", ncols=len(ways), frameon=False)
    figure.suptitle(f"{title} (above a bar: the hybrid's gain)", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)
