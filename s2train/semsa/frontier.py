"""Measures the frontier: held-out loss against density, without further training.

It has points of chosen layouts and of others.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from rich.console import Console

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import ParallelConfig, ScheduleConfig
from s2train.costs.prediction import model_costs
from s2train.distributed.agreement import broadcast_from_rank_0
from s2train.distributed.ranks import is_rank_0, world_size
from s2train.environment.hardware import detect_own
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import check_writable, write_json
from s2train.layouts.patterns import Dense
from s2train.layouts.schedules import find_schedule
from s2train.megatron.setup import initialize, shutdown
from s2train.needles.results import weights_fingerprint
from s2train.semsa.baselines import Layers, mean_density
from s2train.semsa.calibration import Subject, load_studied, read_subject, samples
from s2train.semsa.config import FrontierConfig
from s2train.semsa.frontier_points import DENSE, Point, every_point, find_layers, without_layout
from s2train.semsa.frontier_results import draw_frontier, frontier_table, read_frontier
from s2train.semsa.layouts import layout_of, write_layout
from s2train.semsa.measuring import loss_per_token
from s2train.semsa.needle_scores import Retrieval, needle_row
from s2train.semsa.profile import Profile, check_same_model, load_profile

# Settings that another start may have otherwise: they choose points, are compared by what they name, or change no loss.
# Needles are compared by what determines their trials.
_MAY_DIFFER = ("checkpoint", "data", "densities", "draws", "layouts", "needles", "output", "overwrite", "profile", "tp")


def measure_frontier(cfg: FrontierConfig) -> dict[str, Any]:
    """Measure every layout at every density; print, write JSON and PNG; collective.

    Writes the JSON after every layout, and measures only what it lacks.

    Raises:
        ConfigError: a setting can't work; before a process group exists, unless the checkpoint is damaged.
    """
    profile, subject, retrieval = _read_request(cfg)
    content = begun_content(cfg, profile, subject, retrieval)
    output, rows = Path(cfg.output), content["rows"]
    device = initialize(ParallelConfig(tp=cfg.tp), cfg.seed)
    is_first = is_rank_0()
    if is_first and rows:
        print(f"resuming {output}: {len(rows)} layouts are measured", flush=True)
    measured = {Point(row["layout"], row["budget"], row["draw"]) for row in rows}
    found = _solve([point for point in every_point(cfg) if point not in measured], cfg, profile, is_first)
    loaded = load_studied(
        subject, device, block_size=profile.block_size, tp=cfg.tp, attention_backend=cfg.attention_backend,
        precision=str(profile.about["precision"]),
    )  # fmt: skip
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    texts = list(samples(subject, cfg.samples, held_out=True, rank=rank, ranks=ranks))
    trials = [] if retrieval is None else retrieval.trials(rank, ranks)
    for point, layers in found:
        began = time.perf_counter()
        loss = loss_per_token(loaded.model, layers, texts, profile.seq_length, device)
        row = {
            "layout": point.layout,
            "budget": point.budget,
            "draw": point.draw,
            "density": mean_density(layers, profile),
            "loss": loss,
            "change": loss - (rows[0]["loss"] if rows else loss),  # dense comes first
            "evaluation_seconds": time.perf_counter() - began,
            "predicted_attention_speedup": _speedup(layers, profile),
        }
        if retrieval is not None:
            row |= needle_row(retrieval.score(loaded.model, layers, trials, device))
        if is_first:
            if cfg.layouts is not None:
                row["file"] = _write(Path(cfg.layouts), point, layers, profile)
            found_needles = "" if retrieval is None else f", needles {row['needle_correct']}/{row['needle_trials']}"
            print(f"{point.describe()}: loss {loss:.4f} ({row['change']:+.4f}){found_needles}", flush=True)
        rows.append(row)
        if is_first:
            write_json(output, content)
    content["dense_loss"], content["finished"] = rows[0]["loss"], True
    if is_first:
        write_json(output, content)
        draw_frontier(output.with_suffix(".png"), content, profile.model.name)
        Console(soft_wrap=True, width=120).print(frontier_table(content))
        print(f"frontier {output} and {output.with_suffix('.png')}", flush=True)
    shutdown()
    return content


def _solve(
    missing: Sequence[Point], cfg: FrontierConfig, profile: Profile, is_first: bool
) -> list[tuple[Point, Layers]]:
    """Find the missing points' patterns, and print which have none; collective."""
    # on one rank: a solver under a time limit need not find the same on all
    found = broadcast_from_rank_0(list(find_layers(missing, cfg, profile)) if is_first else None)
    if is_first:
        for line in without_layout(missing, [point for point, _ in found]):
            print(line, flush=True)
    return found


def _read_request(cfg: FrontierConfig) -> tuple[Profile, Subject, Retrieval | None]:
    if Path(cfg.output).suffix != ".json":
        raise ConfigError("output", cfg.output, "is no .json file", "Name one, such as runs/semsa/frontier.json.")
    for name, folder in (("output", Path(cfg.output).parent), ("layouts", cfg.layouts)):
        if folder is not None:
            check_writable(name, folder)
    for name, least in (("samples", 1), ("draws", 0)):
        if getattr(cfg, name) < least:
            raise ConfigError(name, getattr(cfg, name), "too small", f"Set {name}={least} or more.")
    if not cfg.densities or not all(0 < density <= 1 for density in cfg.densities):
        problem = "no shares above 0 and up to 1"
        raise ConfigError("densities", cfg.densities, problem, "Set densities=[0.1,0.25,0.5].")
    profile = load_profile(cfg.profile)
    subject = read_subject(
        cfg.checkpoint, cfg.data, seq_length=profile.seq_length, held_out=True, tp=cfg.tp, seed=cfg.seed,
        attention_backend=cfg.attention_backend, world_size=world_size(),
        hardware=detect_own(),
    )  # fmt: skip
    check_same_model(profile, weights_fingerprint(subject.checkpoint), cfg.profile, subject.checkpoint)
    return profile, subject, Retrieval.read(cfg.needles, subject.tokenizer, profile.seq_length)


def begun_content(
    cfg: FrontierConfig, profile: Profile, subject: Subject, retrieval: Retrieval | None = None
) -> dict[str, Any]:
    """Return settings, and rows that the output already holds.

    Those were measured with the same settings.

    Raises:
        ConfigError: it holds what other settings measured, or the layouts' folder holds other layouts.
    """
    data = subject.cfg.data
    content: dict[str, Any] = {
        "checkpoint": str(subject.checkpoint),
        "weights": profile.about["weights"],
        "model": profile.model.name,
        "profile": {name: value for name, value in profile.about.items() if name not in ("rules", "environment")},
        "rules": [rule.describe() for rule in profile.library],
        "data": {"path": data.path, "valid_path": data.valid_path, "split": data.split},
        "samples": cfg.samples,
        "needles": None if retrieval is None else retrieval.settings,
        "seq_length": profile.seq_length,
        "settings": asdict(cfg),
        "layouts": cfg.layouts,
        "finished": False,
        "rows": [],
        "command": shlex.join(sys.argv),
        "environment": environment(),
    }
    output = Path(cfg.output)
    earlier = read_frontier(output, "output") if output.exists() else None
    if earlier is not None and not (cfg.overwrite and (earlier["finished"] or _others(earlier, content))):
        if others := _others(earlier, content):
            problem = f"exists, measured with another {', '.join(others)}"
            raise ConfigError("output", output, problem, "Add overwrite=true, or set another file.")
        content["rows"] = [row for row in earlier["rows"] if cfg.layouts is None or _has_file(row, Path(cfg.layouts))]
        if content["rows"] and content["rows"][0]["layout"] != DENSE:
            content["rows"] = []
    if cfg.layouts is None or cfg.overwrite or earlier is not None:
        return content
    if there := sorted(Path(cfg.layouts).glob("*.yaml")):
        raise ConfigError("layouts", cfg.layouts, f"holds {there[0].name}", "Set another folder.")
    return content


def _others(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Name what differs in a way that changes losses or scores."""
    asked = json.loads(json.dumps(now))
    compared = ("weights", "profile", "rules", "data", "samples", "needles")
    names = [name for name in compared if earlier.get(name) != asked[name]]
    settings = asked["settings"]
    return names + [
        name
        for name in settings
        if name not in (*_MAY_DIFFER, *names) and earlier["settings"].get(name) != settings[name]
    ]


def _has_file(row: dict[str, Any], folder: Path) -> bool:
    return "file" in row and (folder / row["file"]).is_file()


def _write(folder: Path, point: Point, layers: Layers, profile: Profile) -> str:
    """Write a point's layout, and return its file's name."""
    path = folder / f"{point.name}.yaml"
    comment = [f"{point.describe()}; of the frontier of {profile.about['checkpoint']}:", shlex.join(sys.argv)]
    write_layout(path, layout_of(layers, profile), comment)
    return path.name


def _speedup(layers: Sequence[Sequence[Any]], profile: Profile) -> float:
    """Predict attention's speed-up over dense, forward and backward on one H100."""
    kinds = [LETTERS["D" if all(isinstance(head, Dense) for head in row) else "S"] for row in layers]
    size = profile.block_size
    found = tuple(LayerLayout(kind, tuple(row), size) for kind, row in zip(kinds, layers, strict=True))
    hybrid = HybridLayout(found, profile.block_size, profile.model.num_query_groups, find_schedule(ScheduleConfig()))
    return model_costs(profile.model, hybrid, profile.seq_length).attention_speedup
