"""Evaluates a task, from earlier results to the picture.

Resumes from earlier results, shows progress, and saves a table and a picture.
"""

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
from s2train.needles.results import Cell, CellReach, NeedleResults, load_results
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
    """Evaluate the cells that are missing in `folder`.

    Collective: call it on all ranks; global rank 0 reads, writes and prints. Writes `NAME.json` after each cell and
    `NAME.png` at the end. A `NAME.json` of other settings and its picture are kept there under another name.

    Args:
        grid: a grid that passed `s2train.needles.retrieval.check_fit`.
        asked: results without cells; known cells must have their settings and step, new cells get their command and
            environment.
        reach: computes a cell's reach from its length and depth, without the model.
        trained_length: tokens; longer cells are evaluated too, with a warning.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(quiet=not is_writer, soft_wrap=True)
    table_path, picture_path = folder / f"{name}.json", folder / f"{name}.png"
    if trained_length is not None and max(grid.lengths) > trained_length:
        console.print(
            f"warning: lengths={max(grid.lengths)} exceeds the trained length of {trained_length} tokens: the model has"
            " not seen such distances"
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
            time_taken = f"{cell.seconds:.1f} s" if is_new else "from earlier results"
            progress.console.print(f"{name}  {_describe(cell)}, {time_taken}")
            progress.advance(task)
            began = time.perf_counter()
    if is_writer:
        results.save(table_path)  # updates the score for this grid even if all its cells were known
        draw_heat_map(results, picture_path, title)
    console.print(score_table(results))
    console.print(f"{_summary(results)}   table {table_path}   heat map {picture_path}")
    return results


def _describe(cell: Cell) -> str:
    contained = cell.contained
    found = "" if contained is None else f", {contained.correct}/{contained.trials} values found"
    outcome = f"{cell.correct}/{cell.trials} exact{found}{_describe_reach(cell.reach)}"
    return f"length {cell.length:>7,}  depth {cell.depth:>6.1%}  {outcome}"


def _summary(results: NeedleResults) -> str:
    score = results.score
    assert score is not None  # a grid has at least one cell
    low, high = score.interval
    length = results.effective_length
    reached = f"effective length {length:,}" if length else "no effective length"
    exact = f"score {score.share:.4f} ({low:.4f} to {high:.4f})   {reached} (score {results.threshold:g} or more)"
    contained = results.contained
    return exact if contained is None else f"{exact}   values found {contained.share:.4f}"


def _describe_reach(reach: CellReach | None) -> str:
    """Describe a cell's reach if the layout limits it."""
    if reach is None:
        return ""
    if reach.from_last != 1:
        return ", out of the layers' reach" if reach.from_last < 0 else f", {reach.from_last} layers away"
    is_limited = reach.direct_heads is not None and reach.direct_heads != reach.heads
    return f", seen by {reach.direct_heads} of {reach.heads} heads" if is_limited else ""


def _earlier(asked: NeedleResults, path: Path, console: Console) -> NeedleResults:
    """Load earlier results with the settings and step of `asked`.

    Returns `asked` if there are none.
    """
    earlier = load_results(path)
    # Checkpoints of a run may share the weights' fingerprint, which reads only the ends of shards.
    if earlier is not None and (earlier.settings, earlier.step) == (asked.settings, asked.step):
        return earlier
    if (aside := set_aside(path)) is not None:
        if (picture := path.with_suffix(".png")).exists():  # it shows the earlier results
            picture.rename(aside.with_suffix(".png"))
        console.print(f"{path} held results of other weights or settings; kept as {aside.name}")
    return asked
