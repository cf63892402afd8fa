"""A task's evaluation from start to end: go on from what is known, show progress, leave a table and a picture."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from s2train.distributed.agreement import broadcast_from_rank_0
from s2train.files import set_aside
from s2train.inference.generation import Decode
from s2train.needles.heat_map import draw_heat_map, score_table
from s2train.needles.results import CellReach, NeedleResults, load_results
from s2train.needles.retrieval import NeedleGrid, Ranks, evaluate_grid
from s2train.needles.samples import TaskSampler


def run_needles(
    decode: Decode,
    sampler: TaskSampler,
    grid: NeedleGrid,
    asked: NeedleResults,
    folder: Path,
    *,
    batch_size: int,
    device: torch.device,
    batch_tokens: int | None = None,
    extra_tokens: int = 0,
    trained_length: int | None = None,
    ranks: Ranks | None = None,
    reach: Callable[[int, float], CellReach] | None = None,
    name: str = "needle",
    title: str = "Needle retrieval",
) -> NeedleResults:
    """Evaluate the cells that `folder` lacks; write `NAME.json` after each one and `NAME.png` at the end.

    Call it on all ranks; global rank 0 reads, writes and talks. A `NAME.json` of other settings, and
    its picture, are kept there under another name.

    Args:
        grid: one that `s2train.needles.retrieval.check_fit` passed.
        asked: results without cells, with the settings that a known cell must agree with, and the command and
            environment of new ones.
        reach: of a cell's length and depth, for the results; needs no model.
        trained_length: tokens; longer cells are evaluated all the same, with a note.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not is_writer, soft_wrap=True)
    table_path, picture_path = folder / f"{name}.json", folder / f"{name}.png"
    if trained_length is not None and max(grid.lengths) > trained_length:
        console.print(
            f"warning: lengths={max(grid.lengths)} is past the {trained_length} tokens trained on: the model has not"
            " seen such distances"
        )
    earlier = _earlier(asked, table_path, console) if is_writer else asked
    if dist.is_initialized():
        earlier = broadcast_from_rank_0(earlier)
    results = replace(asked, cells=earlier.cells, command=earlier.command, environment=earlier.environment)
    finished = {(cell.length, cell.depth): cell for cell in earlier.cells}
    cells = evaluate_grid(
        decode, sampler, grid, batch_size=batch_size, batch_tokens=batch_tokens, extra_tokens=extra_tokens,
        device=device, ranks=ranks, finished=finished,
    )  # fmt: skip
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=len(grid.cells))
        began = time.perf_counter()
        for cell in cells:
            is_new = (cell.length, cell.depth) not in finished
            if is_new:
                cell = replace(cell, seconds=round(time.perf_counter() - began, 3))
                results.command, results.environment = asked.command, asked.environment
            if reach and (cell.reach is None or cell.reach.direct_heads is None):
                cell = replace(cell, reach=reach(cell.length, cell.depth))
            results.add(cell)
            if is_writer and is_new:
                results.save(table_path)
            took = f"{cell.seconds:.1f} s" if is_new else "known"
            contained = cell.contained
            found = "" if contained is None else f", {contained.correct}/{contained.trials} values found"
            told = f"{cell.correct}/{cell.trials} exact{found}{_told(cell.reach)}, {took}"
            progress.console.print(f"{name}  length {cell.length:>7,}  depth {cell.depth:>6.1%}  {told}")
            progress.advance(task)
            began = time.perf_counter()
    if is_writer:
        results.save(table_path)  # with the score of the grid asked for, though all its cells were known
        draw_heat_map(results, picture_path, title)
    console.print(score_table(results))
    console.print(f"{_summary(results)}   table {table_path}   heat map {picture_path}")
    return results


def _summary(results: NeedleResults) -> str:
    score = results.score
    assert score is not None  # a grid has a cell
    low, high = score.interval
    length = results.effective_length
    reached = f"effective length {length:,}" if length else "no effective length"
    exact = f"score {score.share:.4f} ({low:.4f} to {high:.4f})   {reached} (score {results.threshold:g} or more)"
    contained = results.contained
    return exact if contained is None else f"{exact}   values found {contained.share:.4f}"


def _told(reach: CellReach | None) -> str:
    """What to add on a cell's reach, where the layout limits it."""
    if reach is None:
        return ""
    if reach.from_last != 1:
        return ", no way through the layers" if reach.from_last < 0 else f", {reach.from_last} layers away"
    is_limited = reach.direct_heads is not None and reach.direct_heads != reach.heads
    return f", seen by {reach.direct_heads} of {reach.heads} heads" if is_limited else ""


def _earlier(asked: NeedleResults, path: Path, console: Console) -> NeedleResults:
    """What `path` holds, if its cells are what `asked` would find; else `asked`."""
    earlier = load_results(path)
    if earlier is not None and earlier.settings == asked.settings:
        return earlier
    if (aside := set_aside(path)) is not None:
        if (picture := path.with_suffix(".png")).exists():  # of the same results: it must not stand beside other ones
            picture.rename(aside.with_suffix(".png"))
        console.print(f"{path} holds results of other weights or settings: kept as {aside.name}")
    return asked
