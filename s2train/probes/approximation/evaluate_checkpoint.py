"""Measures HyperAttention's effect on a checkpoint, and checks its assumptions."""

import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from rich.table import Table
from torch import Tensor

from s2train.attention.hyper import HyperKind
from s2train.checkpoints.folders import find_checkpoint, read_config
from s2train.checkpoints.inference_model import load_for_inference
from s2train.config import ParallelConfig, PretrainConfig
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import output_stem, write_json
from s2train.megatron.model import unwrap
from s2train.megatron.replaced_attention import AttentionInputs, attention_inputs
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.probes.approximation import column_norms
from s2train.probes.approximation.errors import Error, Inputs, errors, synthetic
from s2train.probes.approximation.held_out import held_out_sequences
from s2train.probes.approximation.pictures import Panel, draw_curves
from s2train.probes.approximation.replacement import (
    Grid,
    check_grid,
    hyper_layout,
    measure,
    perplexities,
    read_cells,
    write_cells,
)


@dataclass(frozen=True)
class Model:
    """A checkpoint's model, and sequences to run it on.

    Attributes:
        sequences: int64 [count, length + 1].
    """

    gpt: GPTModel
    cfg: PretrainConfig
    sequences: Tensor
    device: torch.device


@dataclass(frozen=True)
class Source:
    """Where model and text come from.

    Attributes:
        data: a dataset's prefix; None: the held-out part of the run's data.
        length: tokens of a sequence.
        sequences: how many.
    """

    checkpoint: str
    data: str | None
    length: int
    sequences: int

    def read(self) -> tuple[Path, PretrainConfig, Tensor]:
        """Find the checkpoint, and read its settings and the sequences.

        Raises:
            ConfigError: there is none, or the data don't serve.
        """
        for name, value in (("--sequences", self.sequences), ("--length", self.length)):
            if value < 1:
                raise ConfigError(name, value, "nothing would be measured", "Set 1 or more")
        path = find_checkpoint(self.checkpoint)
        cfg = read_config(path)
        return path, cfg, held_out_sequences(cfg.data, self.data, self.length, self.sequences)


@contextmanager
def _loaded(path: Path, cfg: PretrainConfig, sequences: Tensor) -> Iterator[Model]:
    device = initialize(ParallelConfig(), cfg.seed)
    loaded = load_for_inference(path, device)
    yield Model(unwrap(loaded.model), loaded.config, sequences, device)
    shutdown()


def replace_layers(source: Source, grid: Grid, settings: dict[str, Any], output: Path) -> Table:
    """Measure the grid, and write OUTPUT.json and OUTPUT.png.

    A rerun measures what is missing.

    Raises:
        ConfigError: a setting can't work, or the file holds other measurements.
    """
    stem = output_stem(output, "--output")
    path, cfg, sequences = source.read()
    check_grid(grid, cfg, settings, source.length)
    asked = {
        "checkpoint": str(path),
        "weights": weights_fingerprint(path),
        "layers": cfg.layout.layers,
        "data": source.data,
        "length": source.length,
        "sequences": source.sequences,
        "settings": settings,
    }
    more = {"command": shlex.join(sys.argv), "environment": environment()}
    file = stem.with_name(f"{stem.name}.json")
    done = read_cells(file, asked)
    with _loaded(path, cfg, sequences) as model:
        cells = measure(
            model.gpt, cfg, grid, settings, sequences, model.device, done,
            lambda found: write_cells(file, asked, found, more),
        )  # fmt: skip
    unchanged = math.exp(next(cell.loss for cell in cells if cell.last == 0))
    replaced = sorted({cell.last for cell in cells if cell.last})
    curves = {f"last {last}": perplexities(cells, last) for last in replaced}
    if curves:
        title = f"{cfg.model.name}: last layers replaced"
        panel = Panel(title, "samples of an interval", "held-out perplexity", curves, scale="linear")
        draw_curves([panel], stem.with_name(f"{stem.name}.png"), level=unchanged)
    samples = sorted({cell.samples for cell in cells if cell.last})
    table = Table("layers replaced", *(f"{number} samples" for number in samples), title="held-out perplexity")
    table.add_row("0", *(f"{unchanged:.3f}" for _ in samples))
    for last in replaced:
        found = perplexities(cells, last)
        table.add_row(str(last), *(f"{found[number]:.3f}" if number in found else "" for number in samples))
    return table


def diagnose(
    source: Source, lengths: Sequence[int], samples: Sequence[int], draws: int, settings: dict[str, Any], output: Path
) -> Table:
    """Measure column norms by length and errors by number of samples.

    Writes OUTPUT.json and OUTPUT.png.

    Raises:
        ConfigError: a setting can't work.
    """
    stem = output_stem(output, "--output")
    path, cfg, sequences = source.read()
    lengths = sorted(set(lengths))
    if lengths[0] < 1 or lengths[-1] > source.length:
        problem = f"lengths are 1 to those of a sequence, --length {source.length}"
        raise ConfigError("--lengths", lengths, problem, "Set others, or a greater --length")
    if draws < 1:
        raise ConfigError("--draws", draws, "nothing is drawn", "Set 1 or more")
    layouts = {number: hyper_layout(cfg, settings, number, source.length) for number in samples}
    kind = layouts[samples[0]].kind
    assert isinstance(kind, HyperKind)
    norms: list[column_norms.Columns] = []
    with _loaded(path, cfg, sequences) as model:
        inputs = _inputs(model)
        for layer, own in inputs.items():
            found = column_norms.squared_column_norms(own.query, own.key, own.scale, lengths)
            norms += [column_norms.columns(layer, n, one) for n, one in zip(lengths, found, strict=True)]
        heads, dim = cfg.model.num_attention_heads, model.gpt.config.kv_channels
        assert dim is not None
        cases = [one.on(model.device) for one in synthetic(source.length, heads, dim, cfg.seed)]
        for layer, own in inputs.items():
            query, key, value = (x[:, :1].float() for x in (own.query, own.key, own.value))
            cases.append(Inputs(f"layer {layer}", query, key, value, own.scale))
        measured = [one for case in cases for one in errors(case, kind.op_settings, samples, draws)]
    content = {
        "checkpoint": str(path),
        "weights": weights_fingerprint(path),
        "length": source.length,
        "sequences": source.sequences,
        "draws": draws,
        "settings": settings,
        "columns_left_out": column_norms.LEFT_OUT,
        "column_norms": [asdict(one) for one in norms],
        "published": column_norms.PUBLISHED,
        "errors": [asdict(one) for one in measured],
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    write_json(stem.with_name(f"{stem.name}.json"), content)
    _draw(norms, measured, stem.with_name(f"{stem.name}.png"))
    return norm_table(norms, lengths)


def _inputs(model: Model) -> dict[int, AttentionInputs]:
    """What every layer's attention gets, of all sequences together."""
    tokens = model.sequences[:, :-1].to(model.device)
    positions = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens).contiguous()
    with torch.no_grad(), attention_inputs(model.gpt, range(model.cfg.model.num_layers)) as found:
        model.gpt(tokens, positions, None)
    return found


def _draw(norms: Sequence[column_norms.Columns], measured: Sequence[Error], path: Path) -> None:
    by_layer = {
        f"layer {layer}": {one.length: one.mean_of_rest for one in norms if one.layer == layer}
        for layer in sorted({one.layer for one in norms})
    }
    curves = {
        name: {one.samples: one.relative for one in measured if one.inputs == name}
        for name in dict.fromkeys(one.inputs for one in measured)
    }
    without = f"α/n without {column_norms.LEFT_OUT} columns"
    panels = [
        Panel("Error against samples", "samples of an interval", "relative error", curves),
        Panel(without, "n (tokens)", "α/n", by_layer | {"published": column_norms.PUBLISHED}),
    ]
    draw_curves(panels, path)


def norm_table(norms: Sequence[column_norms.Columns], lengths: Sequence[int]) -> Table:
    """List α/n by layer and length, beside published values."""
    table = Table("layer", *(f"n = {n:,}" for n in lengths), title=f"α/n (without {column_norms.LEFT_OUT} columns)")
    for layer in sorted({one.layer for one in norms}):
        own = {one.length: one for one in norms if one.layer == layer}
        table.add_row(str(layer), *(f"{own[n].mean:.4f} ({own[n].mean_of_rest:.4f})" for n in lengths))
    published = [f"{column_norms.PUBLISHED[n]:.4f}" if n in column_norms.PUBLISHED else "" for n in lengths]
    if any(published):
        table.add_row("published", *published)
    return table
