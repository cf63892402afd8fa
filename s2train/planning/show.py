"""Shows a layout's coverage, reach and costs: tables, picture, JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from s2train.attention.coverage import coverage_report, percent, union_coverage
from s2train.attention.features import Feature
from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.reachability import DistanceRow, distance_table, reach
from s2train.costs.memory import GIB
from s2train.costs.prediction import LENGTHS, ModelCosts, known_lengths, model_costs
from s2train.errors import ConfigError
from s2train.files import check_writable, write_json
from s2train.pictures import choose_layers, draw_layout
from s2train.pictures.style import tokens
from s2train.planning.checks import check_blocks
from s2train.planning.config import ShowLayoutConfig
from s2train.planning.run_layout import hybrid_layout
from s2train.validation.attention_kinds import require_feature
from s2train.validation.values import check_sequence, check_values

_TERA = 1e12
_COLUMNS = 120  # width of the tables, whatever the terminal's: in narrower ones, rich silently truncates digits


def show(cfg: ShowLayoutConfig) -> None:
    """Print the tables; write layout.png and layout.json to `cfg.output`.

    Blocks that no head sees are shown, not rejected.

    Raises:
        ConfigError: a setting can't work, a layer doesn't exist, or the folder can't be written.
    """
    if cfg.seq_length is not None:
        if cfg.seq_length < 1:
            raise ConfigError("seq_length", cfg.seq_length, "there are no tokens", "Set seq_length to 1 or more.")
        check_sequence("seq_length", cfg.seq_length, cfg.layout.block_size)
        cfg.train.seq_length = cfg.seq_length
    check_values(cfg)
    hybrid, seq_length, folder = hybrid_layout(cfg), cfg.train.seq_length, Path(cfg.output)
    check_blocks(cfg, hybrid)
    remedy = "Run launch/pretrain.py with plan=true for its costs"
    require_feature(hybrid, Feature.PICTURES, "layout.layers", cfg.layout.layers, remedy)
    choose_layers(hybrid, cfg.layers)
    check_writable("output", folder)
    here = model_costs(cfg.model, hybrid, seq_length)
    by_length = [model_costs(cfg.model, hybrid, length) for length in _lengths(hybrid, seq_length)]
    distances = distance_table(reach(hybrid, seq_length))
    console = Console(soft_wrap=True, width=_COLUMNS)
    console.print(f"[bold]{cfg.model.name}[/bold] at {seq_length:,} tokens, blocks of {hybrid.block_size}")
    console.print(_layer_table(hybrid, here, seq_length))
    console.print(coverage_report(hybrid, seq_length).format(), highlight=False)
    console.print(_reach_table(distances))
    console.print(_length_table(by_length))
    draw_layout(hybrid, seq_length, folder / "layout.png", cfg.layers, cfg.model.name)
    write_json(folder / "layout.json", _content(cfg, hybrid, here, by_length, distances))
    console.print(f"picture {folder / 'layout.png'}   figures {folder / 'layout.json'}")


def _lengths(hybrid: HybridLayout, seq_length: int) -> list[int]:
    return sorted({*known_lengths(hybrid, LENGTHS), seq_length})


def _distinct_layers(hybrid: HybridLayout) -> list[tuple[LayerLayout, list[int]]]:
    """List the distinct layers, each with the indices of all equal layers."""
    return [
        (layer, [number for number, other in enumerate(hybrid.layers) if other == layer])
        for layer in dict.fromkeys(hybrid.layers)
    ]


def _forms(layer: LayerLayout) -> str:
    """Describe the patterns of a layer's heads.

    An example is 2 × dense; 30 × local 8.
    """
    counts: dict[str, int] = {}
    for head in layer.heads:
        counts[head.form()] = counts.get(head.form(), 0) + 1
    return next(iter(counts)) if len(counts) == 1 else "; ".join(f"{count} × {form}" for form, count in counts.items())


def _table(title: str, headings: Sequence[str], left: Sequence[str] = ()) -> Table:
    """Create a table that fits 80 columns without truncating numbers.

    Columns in `left` hold words.
    """
    table = Table(
        title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", title_style="bold"
    )
    for name in headings:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold", no_wrap=name not in left)
    return table


def _layer_table(hybrid: HybridLayout, costs: ModelCosts, seq_length: int) -> Table:
    headings = ("layers", "heads", "density", "KV-efficient", "coverage", "KV", "peak")
    table = _table("Layers (KV: cached tokens at the end, and peak, relative to a dense layer)", headings, headings[:2])
    for layer, numbers in _distinct_layers(hybrid):
        of_layer = costs.layers[numbers[0]]
        table.add_row(
            _runs(numbers),
            _forms(layer),
            f"{of_layer.density:.4f}",
            "yes" if all(head.kv_efficient for head in set(layer.heads)) else "no",
            percent(union_coverage(layer.heads, layer.num_blocks(seq_length)).fraction),
            f"{of_layer.cache.end / of_layer.cache.dense:.3f}",
            f"{of_layer.cache.peak / of_layer.cache.dense:.3f}",
        )
    return table


def _runs(numbers: Sequence[int]) -> str:
    """Format 1, 2, 3, 5 as 1-3, 5.

    Long lists are shortened to their first runs and the count.
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(words) if len(words) <= 3 else f"{', '.join(words[:2])}, … ({len(numbers)})"


def _reach_table(rows: Sequence[DistanceRow]) -> Table:
    """Tabulate reach by distance; merge near distances that one layer reaches entirely."""
    layers = len(rows[0].within) if rows else 0
    shown = sorted({1, 2, 3, 4, 8, 16, 32, layers} & set(range(1, layers + 1)))
    headings = ("distance (tokens)", *(f"{count} layer{'s' if count > 1 else ''}" for count in shown))
    table = _table("Share of positions that the last position reaches through the model's last layers", headings)
    near = 0
    while near < len(rows) and rows[near].within[0] == 1:
        near += 1
    if near:
        table.add_row(f"1 to {rows[near - 1].farthest:,}", *(["100 %"] * len(shown)))
    for row in rows[near:]:
        table.add_row(f"{row.nearest:,} to {row.farthest:,}", *(percent(row.within[count - 1]) for count in shown))
    return table


def _length_table(by_length: Sequence[ModelCosts]) -> Table:
    headings = ("tokens", "density", "TFLOP", "least", "streamed", "KV", "dense", "attention", "step")
    title = (
        "One sequence: attention's TFLOP and GiB moved (least, streamed), forward and backward;\n"
        "peak KV cache (GiB, bf16), and if dense; predicted speed-ups over dense on an H100"
    )
    table = _table(title, headings)
    for costs in by_length:
        moved, cache, dim = costs.traffic, costs.cache, costs.head_dim
        table.add_row(
            tokens(costs.seq_length),
            f"{costs.density:.3f}",
            _figure((costs.forward_flops + costs.backward_flops) / _TERA),
            _figure((moved.forward_least + moved.backward_least) / GIB),
            _figure((moved.forward + moved.backward) / GIB),
            *(_figure(cache.nbytes(count, dim) / GIB) for count in (cache.peak, cache.dense)),
            f"{costs.attention_speedup:.2f}",
            f"{costs.step_speedup:.2f}",
        )
    return table


def _figure(number: float) -> str:
    """Format a number with three significant digits and a unit."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:  # or it would be formatted as 1e+03
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _content(
    cfg: ShowLayoutConfig,
    hybrid: HybridLayout,
    here: ModelCosts,
    by_length: Sequence[ModelCosts],
    distances: Sequence[DistanceRow],
) -> dict[str, Any]:
    seq_length = here.seq_length
    return {
        "model": cfg.model.name,
        "seq_length": seq_length,
        "layout": asdict(cfg.layout),
        "schedule": asdict(cfg.schedule),
        "layers": [
            {
                "layers": numbers,
                "kind": layer.kind.label,
                "heads": [head.describe() for head in layer.heads],
                "density": here.layers[numbers[0]].density,
                "kv_efficient": all(head.kv_efficient for head in layer.heads),
                "coverage": union_coverage(layer.heads, layer.num_blocks(seq_length)).fraction,
                "attention_flops": {
                    "forward": here.layers[numbers[0]].forward_flops,
                    "backward": here.layers[numbers[0]].backward_flops,
                },
                "attention_bytes": asdict(here.layers[numbers[0]].traffic),
                "kv_cache_tokens": asdict(here.layers[numbers[0]].cache),
            }
            for layer, numbers in _distinct_layers(hybrid)
        ],
        "reach_within_last_layers": [asdict(row) for row in distances],
        "costs": [costs.to_json() for costs in by_length],
    }
