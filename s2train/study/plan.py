"""Predicts tokens, seconds and memory of every run of the quality study."""

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from s2train.costs.memory import GIB
from s2train.data.epochs import describe_epochs, training_epochs
from s2train.data.indexed import read_document_lengths
from s2train.planning import compose_run, hybrid_layout, make_plan
from s2train.planning.targets import target_gpu
from s2train.study import speed
from s2train.study.files import Folders
from s2train.study.settings import Recipe, data_commands, probed_lengths, train_settings
from s2train.study.tables import millions
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
        row = (f"{made.density:.4f}", millions(tokens), f"{steps:,}", seconds)
        own = measured.get(speed.key(run, gpus))
        found = (f"{tokens / own['tokens_per_s']:,.0f}", f"{own['peak_memory_gib']:.1f}") if own else ("", "")
        table.add_row(run.name, *row, found[0], f"{made.memory.total / GIB:.1f}", found[1])
    counted = "all" if len(predicted) == len(runs) else f"{len(predicted)} of {len(runs)} runs"
    table.add_row(counted, "", "", "", f"{sum(predicted):,.0f}")
    return table


def data_notes(folders: Folders, recipe: Recipe, runs: Sequence[Run]) -> list[str]:
    """Say what the data are too small for.

    The first line has how often the longest run reads the training split. There are none before the data, or for runs
    that start from others.
    """
    first = [run for run in runs if PHASES[run.phase].after is None]
    if not first or not all(index.is_file() for index, _ in data_commands(folders)):
        return []
    cfg = compose_run(train_settings(folders, max(first, key=lambda run: PHASES[run.phase].tokens), recipe))
    samples = cfg.train.steps * cfg.train.global_batch_size
    notes = describe_epochs(cfg.data, training_epochs(cfg.data, samples, cfg.train.seq_length))
    lengths = read_document_lengths(str(folders.held_out_data))
    needed = max(PHASES[run.phase].held_out_tokens for run in first)
    if (count := int(lengths.sum(dtype=np.int64))) < needed:
        notes.append(
            f"warning: an evaluation reads {needed:,} held-out tokens, and there are {count:,}, which it "
            "repeats. Hold out more, with held_out_share or held_out"
        )
    probed = max(probed_lengths(PHASES[run.phase].length)[-1] for run in first)
    if (longest := int(lengths.max())) <= probed:
        notes.append(
            f"warning: `evaluate` probes {probed:,} tokens, and the longest held-out document has {longest:,}. Hold "
            "out a larger subsystem, or set lengths=[…] of `evaluate`"
        )
    return notes
