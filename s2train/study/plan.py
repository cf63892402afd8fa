"""Predicts tokens, seconds and memory of every run of the quality study."""

from collections.abc import Sequence

from rich.table import Table

from s2train.costs.memory import GIB
from s2train.planning import compose_run, hybrid_layout, make_plan
from s2train.planning.targets import target_gpu
from s2train.study import speed
from s2train.study.files import Folders
from s2train.study.settings import Recipe, train_settings
from s2train.study.variants import PHASES, Run


def plan_table(folders: Folders, recipe: Recipe, gpus: int, device: str, runs: Sequence[Run]) -> Table:
    """Tabulate the runs, with planned and measured time and memory.

    Seconds are those of the steps, without starting, evaluating and saving. They are left out of runs that have no
    prediction, and the total then says so.
    """
    heads = ("run", "density", "tokens", "steps", "seconds", "measured", "GiB", "measured")
    table = Table(*heads, title=f"on {gpus} × {device}")
    measured, predicted = speed.read(folders), list[float]()
    for run in runs:
        cfg = compose_run(train_settings(folders, run, recipe, gpus))
        made = make_plan(cfg, hybrid_layout(cfg), gpus, target_gpu(device))
        tokens = PHASES[run.phase].tokens
        seconds = ""
        if made.prediction:
            predicted.append(tokens / made.prediction.tokens_per_s)
            seconds = f"{predicted[-1]:,.0f}"
        steps = -(-tokens // recipe.batch_tokens)
        row = (f"{made.density:.4f}", f"{tokens / 1e6:,.0f}M", f"{steps:,}", seconds)
        own = measured.get(speed.key(run, gpus))
        found = (f"{tokens / own['tokens_per_s']:,.0f}", f"{own['peak_memory_gib']:.1f}") if own else ("", "")
        table.add_row(run.name, *row, found[0], f"{made.memory.total / GIB:.1f}", found[1])
    counted = "all" if len(predicted) == len(runs) else f"{len(predicted)} of {len(runs)} runs"
    table.add_row(counted, "", "", "", f"{sum(predicted):,.0f}")
    return table
