"""Measures the frontier: held-out loss against density, without further training.

It has points of chosen layouts and of others.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from megatron.core import parallel_state
from rich import box
from rich.console import Console
from rich.table import Table

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import ParallelConfig, ScheduleConfig
from s2train.costs.prediction import model_costs
from s2train.distributed.agreement import broadcast_from_rank_0
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import check_output, replacing
from s2train.kernels.block_statistics.effects import SUMS
from s2train.layouts.patterns import Dense
from s2train.layouts.schedules import find_schedule
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.pictures.style import GREY, Sheet, plain
from s2train.semsa.baselines import Layers, draws, mean_density, random_rules, stripes, uniform_window
from s2train.semsa.calibration import Subject, load_studied, read_subject, samples
from s2train.semsa.config import FrontierConfig
from s2train.semsa.layouts import Candidates
from s2train.semsa.measuring import loss_per_token
from s2train.semsa.pictures import curve
from s2train.semsa.profile import Profile, check_same_model, group_size, load_profile
from s2train.semsa.solving import Budget, solve

_NAMES = {
    "squared": "SemSA, squared effect",
    "absolute": "absolute effect",
    "signed": "signed effect",
    "mass": "magnitude (dropped probability)",
    "random": "random rules",
    "window": "uniform window and a sink",
    "stripes": "S2 stripes",
}


def measure_frontier(cfg: FrontierConfig) -> dict[str, Any]:
    """Measure every layout at every density; print, write JSON and PNG; collective.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    profile, subject, output = _read_request(cfg)
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    loaded = load_studied(
        subject, device, block_size=profile.block_size, tp=cfg.tp, attention_backend=cfg.attention_backend,
        precision=str(profile.about["precision"]),
    )  # fmt: skip
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    texts = list(samples(subject, cfg.samples, held_out=True, rank=rank, ranks=ranks))
    is_first = os.environ.get("RANK", "0") == "0"
    length = profile.seq_length
    dense = loss_per_token(loaded.model, None, texts, length, device)
    rows: list[dict[str, Any]] = []
    # solved on one rank: a solver under a time limit need not find the same on all
    layouts = broadcast_from_rank_0(list(_layouts(cfg, profile)) if is_first else None)
    for name, budget, layers in layouts:
        began = time.perf_counter()
        loss = loss_per_token(loaded.model, layers, texts, length, device)
        rows.append(
            {
                "layout": name,
                "budget": budget,
                "density": mean_density(layers, profile),
                "loss": loss,
                "change": loss - dense,
                "evaluation_seconds": time.perf_counter() - began,
                "predicted_attention_speedup": _speedup(layers, profile),
            }
        )
        if is_first:
            print(f"density {budget:g}, {_NAMES[name]}: loss {loss:.4f} ({loss - dense:+.4f})", flush=True)
    content = {
        "checkpoint": str(loaded.path),
        "weights": profile.about["weights"],
        "profile": {name: value for name, value in profile.about.items() if name not in ("rules", "environment")},
        "rules": [rule.describe() for rule in profile.library],
        "dense_loss": dense,
        "samples": cfg.samples,
        "seq_length": length,
        "settings": asdict(cfg),
        "rows": rows,
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    if is_first:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draw(output.with_suffix(".png"), content, profile.model.name)
        Console(soft_wrap=True, width=120).print(_table(content))
        print(f"frontier {output} and {output.with_suffix('.png')}", flush=True)
    shutdown()
    return content


def _read_request(cfg: FrontierConfig) -> tuple[Profile, Subject, Path]:
    if Path(cfg.output).suffix != ".json":
        raise ConfigError("output", cfg.output, "is no .json file", "Name one, such as runs/semsa/frontier.json.")
    output = check_output(cfg.output, cfg.overwrite, such="runs/semsa/frontier.json")
    for name, least in (("samples", 1), ("draws", 0)):
        if getattr(cfg, name) < least:
            raise ConfigError(name, getattr(cfg, name), "too small", f"Set {name}={least} or more.")
    if not cfg.densities or not all(0 < density <= 1 for density in cfg.densities):
        problem = "no shares above 0 and up to 1"
        raise ConfigError("densities", cfg.densities, problem, "Set densities=[0.1,0.25,0.5].")
    profile = load_profile(cfg.profile)
    subject = read_subject(
        cfg.checkpoint, cfg.data, seq_length=profile.seq_length, held_out=True, tp=cfg.tp, seed=cfg.seed,
        attention_backend=cfg.attention_backend, world_size=int(os.environ.get("WORLD_SIZE", "1")),
        hardware=detect_own(),
    )  # fmt: skip
    check_same_model(profile, weights_fingerprint(subject.checkpoint), cfg.profile, subject.checkpoint)
    return profile, subject, output


def _layouts(cfg: FrontierConfig, profile: Profile) -> Iterator[tuple[str, float, Layers]]:
    """Yield name, density and patterns of each layout that meets a density.

    Layouts that can't meet it are left out.
    """
    model, candidates = profile.model, Candidates.of(profile)
    group = group_size(model) if cfg.whole_groups else 1
    share = candidates.density(profile.block_size, profile.seq_length)
    costs = {name: profile.costs(name) for name in SUMS}
    for density in sorted(cfg.densities):
        for name, cost in costs.items():
            if (found := solve(cost, [Budget(share, density)], group=group)) is not None:
                yield name, density, candidates.of_heads(found.rules)
        for name, layers in (("window", uniform_window(profile, density)), ("stripes", stripes(profile, density))):
            if layers is not None:
                yield name, density, layers
        for rng in draws(cfg.draws, cfg.seed, density):
            if (drawn := random_rules(profile, candidates, density, group, rng)) is not None:
                yield "random", density, drawn


def _speedup(layers: Layers, profile: Profile) -> float:
    """Predict attention's speed-up over dense, forward and backward on one H100."""
    kinds = [LETTERS["D" if all(isinstance(head, Dense) for head in row) else "S"] for row in layers]
    size = profile.block_size
    found = tuple(LayerLayout(kind, tuple(row), size) for kind, row in zip(kinds, layers, strict=True))
    hybrid = HybridLayout(found, profile.block_size, profile.model.num_query_groups, find_schedule(ScheduleConfig()))
    return model_costs(profile.model, hybrid, profile.seq_length).attention_speedup


def _table(content: dict[str, Any]) -> Table:
    title = f"Change of the held-out loss (dense {content['dense_loss']:.4f}), without training"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    budgets = sorted({row["budget"] for row in content["rows"]})
    table.add_column("density")
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right")
    for name, title in _NAMES.items():
        cells = []
        for budget in budgets:
            own = [row["change"] for row in content["rows"] if row["layout"] == name and row["budget"] == budget]
            spread = f" ({min(own):+.3f} to {max(own):+.3f})" if len(own) > 1 else ""
            cells.append(f"{sum(own) / len(own):+.4f}{spread}" if own else "–")
        table.add_row(title, *cells)
    return table


def draw(path: Path, content: dict[str, Any], title: str) -> None:
    """Draw the change of the loss over the density."""
    sheet = Sheet(7.4, 4.8)
    FigureCanvasAgg(sheet.figure)
    sheet.text(0.45, 0.2, f"{title}: loss against density, without training", size=12, bold=True)
    tokens, dense = content["seq_length"], content["dense_loss"]
    sheet.text(0.45, 0.5, f"{tokens:,} tokens, {content['samples']} held-out samples; dense {dense:.4f}", colour=GREY)
    axes = sheet.axes(0.85, 0.9, 6.2, 3.3)
    for number, (name, label) in enumerate(_NAMES.items()):
        own = [row for row in content["rows"] if row["layout"] == name]
        if own:
            curve(axes, own, "density", "change", label, number, "." if name == "random" else "o-")
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.set_xlabel("density: share of causal positions that heads keep", fontsize=8.5, color=GREY)
    axes.set_ylabel("change of the held-out loss (nats per token)", fontsize=8.5, color=GREY)
    axes.legend(frameon=False, fontsize=8)
    plain(axes, 8)
    with replacing(path) as temporary:
        sheet.figure.savefig(temporary, format="png")
