"""Measures a trained model's loss with its last layers replaced by HyperAttention.

The model is not trained further, as in the published use of HyperAttention (arXiv 2310.05869, section 4.1). Results
are kept in a JSON file cell by cell, and a rerun computes the missing ones.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from s2train.attention.hyper import HyperKind
from s2train.attention.kind import KindContext, LayerLayout
from s2train.attention.registry import read_kind
from s2train.config import PretrainConfig
from s2train.errors import ConfigError
from s2train.files import reading, write_json
from s2train.layouts.patterns import LayerContext
from s2train.megatron.replaced_attention import replaced_attention

_SETTING = "hyper"  # where the settings would be in a run; `_as_typed` removes it from errors


@dataclass(frozen=True)
class Cell:
    """Loss with one setting and one draw of random numbers.

    Attributes:
        last: layers replaced, from the end; 0: none.
        samples: keys drawn from each interval.
        loss: nats per token.
    """

    last: int
    samples: int
    draw: int
    loss: float

    @property
    def key(self) -> tuple[int, int, int]:
        return self.last, self.samples, self.draw


@dataclass(frozen=True)
class Grid:
    """What to measure."""

    last: tuple[int, ...]
    samples: tuple[int, ...]
    draws: int

    def cells(self) -> list[tuple[int, int, int]]:
        """Cells to measure, the unchanged model first."""
        changed = product(sorted(n for n in self.last if n), self.samples, range(self.draws))
        return [(0, 0, 0), *changed]


def hyper_layout(cfg: PretrainConfig, settings: dict[str, Any], samples: int, length: int) -> LayerLayout:
    """Make a HyperAttention layer for the model and sequences of `length` tokens.

    Args:
        settings: those of the command line, without `samples` and `kind`.

    Raises:
        ConfigError: a setting can't be, alone or with these; named as on the command line.
    """
    for name, problem in (("samples", "--samples has its values"), ("kind", "HyperAttention alone is measured")):
        if name in settings:
            raise ConfigError(name, settings[name], problem, "Leave it out.")
    given = {**settings, "kind": HyperKind.name, "samples": samples}
    try:
        kind = read_kind("H", given, _SETTING)
        context = LayerContext(
            0, cfg.model.num_attention_heads, cfg.model.num_query_groups, cfg.layout.block_size, lambda _: (), _SETTING
        )
        layout = LayerLayout(kind, kind.heads()(KindContext(context)), cfg.layout.block_size)
        kind.check(replace(cfg, train=replace(cfg.train, seq_length=length)))
    except ConfigError as error:
        raise ConfigError(
            _as_typed(error.setting), error.value, _as_typed(error.problem), _as_typed(error.remedy)
        ) from error
    return layout


def _as_typed(text: str) -> str:
    """Replace names of a run's settings by those of the command line."""
    for name, typed in ((f"{_SETTING}.samples", "--samples"), (f"{_SETTING}.", ""), ("train.seq_length", "--length")):
        text = text.replace(name, typed)
    return text


def check_grid(grid: Grid, cfg: PretrainConfig, settings: dict[str, Any], length: int) -> None:
    """Check every cell before a model is built.

    Raises:
        ConfigError: more layers than the model has, or settings that can't be.
    """
    layers = cfg.model.num_layers
    for last in grid.last:
        if not 0 <= last <= layers:
            raise ConfigError("--last", last, f"the model has {layers} layers", f"Set 0 to {layers}")
    if grid.draws < 1:
        raise ConfigError("--draws", grid.draws, "nothing is drawn", "Set 1 or more")
    for samples in grid.samples:
        hyper_layout(cfg, settings, samples, length)


@torch.no_grad()
def held_out_loss(gpt: GPTModel, sequences: Tensor, device: torch.device) -> float:
    """Mean loss of sequences [count, length + 1], nats per token."""
    total = 0.0
    for sequence in sequences:
        tokens = sequence.to(device)
        positions = torch.arange(len(tokens) - 1, device=device)[None]
        logits = gpt(tokens[None, :-1], positions, None)[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, tokens[1:]))
    return total / len(sequences)


def measure(
    gpt: GPTModel,
    cfg: PretrainConfig,
    grid: Grid,
    settings: dict[str, Any],
    sequences: Tensor,
    device: torch.device,
    done: Sequence[Cell],
    save: Callable[[list[Cell]], None],
) -> list[Cell]:
    """Measure the cells that are not `done`; `save` is called after each."""
    cells = list(done)
    layers, length = cfg.model.num_layers, sequences.shape[1] - 1
    for last, samples, draw in grid.cells():
        if (last, samples, draw) in {cell.key for cell in cells}:
            continue
        layouts = {}
        if last:
            layout = hyper_layout(cfg, settings, samples, length)
            layouts = dict.fromkeys(range(layers - last, layers), layout)
        with replaced_attention(gpt, layouts) as cores:
            for core in cores:
                core.step = draw
            cells.append(Cell(last, samples, draw, held_out_loss(gpt, sequences, device)))
        save(cells)
        print(line(cells[-1]), flush=True)
    return cells


def line(cell: Cell) -> str:
    """One cell, for people."""
    what = f"last {cell.last}, {cell.samples} samples, draw {cell.draw}" if cell.last else "no layer replaced"
    return f"{what}: loss {cell.loss:.4f}, perplexity {math.exp(cell.loss):.3f}"


def read_cells(path: Path, asked: dict[str, Any]) -> list[Cell]:
    """Read the cells of an earlier run.

    Raises:
        ConfigError: the file holds those of another question, or other content.
    """
    if not path.is_file():
        return []
    with reading("--output", path):
        found = json.loads(path.read_text())
        if different := [name for name, value in asked.items() if found.get(name) != value]:
            problem = f"it was measured with another {' and '.join(different)}"
            raise ConfigError("--output", path, problem, "Name another file")
        return [Cell(**{key: row[key] for key in ("last", "samples", "draw", "loss")}) for row in found["cells"]]


def write_cells(path: Path, asked: dict[str, Any], cells: Sequence[Cell], more: dict[str, Any]) -> None:
    """Write the question and its cells as JSON."""
    rows = [asdict(cell) | {"perplexity": math.exp(cell.loss)} for cell in cells]
    write_json(path, asked | more | {"cells": rows})


def perplexities(cells: Sequence[Cell], last: int) -> dict[int, float]:
    """Compute perplexity by number of samples, with `last` layers replaced.

    It is that of the mean loss over draws.
    """
    own = [cell for cell in cells if cell.last == last]
    return {
        samples: math.exp(mean(cell.loss for cell in own if cell.samples == samples))
        for samples in sorted({cell.samples for cell in own})
    }
