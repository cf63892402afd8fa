"""Plans and records runs that continue a checkpoint under other layouts.

Each run has the dense run's settings, but for its layout. Its learning rate follows the dense run's schedule, and stays
at its lowest past the schedule's end. The dense layout continues too, as the control.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from filelock import FileLock

from s2train.checkpoints.folders import find_checkpoint, read_config, read_progress
from s2train.command_line.layout_files import PREFIX
from s2train.command_line.overrides import quoted
from s2train.comparison.claims import claim
from s2train.comparison.runs import summarize
from s2train.config import PlanConfig, PretrainConfig
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.files import check_writable, reading, replacing, write_json
from s2train.needles.results import weights_fingerprint
from s2train.semsa.frontier_points import DENSE, NAMES, Point
from s2train.semsa.frontier_results import check_same_layouts, read_frontier
from s2train.training.records import read_records

RESULTS = "continued.json"
_SETTINGS = "continued"  # name of the runs' settings
_NEW_ORDER = 1000  # added to the seed: with the dense run's, these runs would read its first batches once more
_HEADER = """\
# The settings that all these runs share: those of the dense run, continued.
defaults:
  - pretrain_schema
  - writes_nothing
  - layout: dense
  - _self_
  - override hydra/job_logging: disabled
  - override hydra/hydra_logging: disabled

"""


@dataclass(frozen=True)
class Study:
    """Runs that continue one checkpoint.

    Attributes:
        frontier: content of the frontier's file.
        checkpoint: the dense checkpoint.
        first: its step.
        steps: further ones.
        folder: of settings, runs and results.
        settings: further settings of launch/pretrain.py.
    """

    frontier: dict[str, Any]
    checkpoint: Path
    first: int
    steps: int
    folder: Path
    settings: tuple[str, ...] = ()

    @property
    def last(self) -> int:
        return self.first + self.steps

    @property
    def results(self) -> Path:
        return self.folder / RESULTS


@dataclass(frozen=True)
class Continuation:
    """One run: a point of the frontier and its layout file."""

    point: Point
    row: dict[str, Any]
    file: Path

    @property
    def name(self) -> str:
        return self.point.name


def read_study(frontier: Path, folder: Path, steps: int, settings: Sequence[str] = ()) -> Study:
    """Read what a study starts from.

    Raises:
        ConfigError: the frontier, its checkpoint or its layouts are missing, the checkpoint has other weights, or the
            folder can't be written or holds another study.
    """
    if steps < 1:
        raise ConfigError("steps", steps, "too few", "Set --steps 200.")
    check_writable("output", folder)
    content = read_frontier(frontier, "frontier")
    if content.get("layouts") is None:
        problem = "its layouts were not written"
        raise ConfigError("frontier", frontier, problem, "Measure it with layouts=FOLDER.")
    checkpoint = find_checkpoint(content["checkpoint"], "frontier")
    if (weights := weights_fingerprint(checkpoint)) != content["weights"]:
        problem = f"is of weights {content['weights']}, and {checkpoint} now has others ({weights})"
        raise ConfigError("frontier", frontier, problem, "Profile this checkpoint, and measure its frontier.")
    study = Study(content, checkpoint, read_progress(checkpoint).step, steps, folder, tuple(settings))
    _check_same_study(study)
    return study


def begin(study: Study) -> None:
    """Write the shared settings, and what the results are of.

    Raises:
        ConfigError: the folder holds another study, which another process began.
    """
    with _recording(study):
        _check_same_study(study)
        if not study.results.is_file():
            _write_rows(study, [])
        write_settings(study)


def _check_same_study(study: Study) -> None:
    if study.results.is_file():
        earlier, now = read_results(study.folder), _about(study)
        if others := [name for name in now if earlier.get(name) != now[name]]:
            problem = f"{study.results} holds runs with another {', '.join(others)}"
            raise ConfigError("output", study.folder, problem, "Set another folder.")
        check_same_layouts(study.frontier, earlier["rows"], study.results, "file", "output")


def continuations(
    study: Study, densities: Sequence[float] | None, layouts: Sequence[str], draws: int
) -> list[Continuation]:
    """Return the runs at these densities, dense first.

    Args:
        densities: None: all of the frontier.
        draws: random layouts at each density.
    Raises:
        ConfigError: the frontier has no such density or layout, a layout file is missing, or nothing is drawn.
    """
    if draws < 1 and "random" in layouts:
        raise ConfigError("draws", draws, "too few", "Set --draws 1, or leave random out of --layouts.")
    rows, folder = study.frontier["rows"], Path(study.frontier["layouts"])
    there = sorted({row["budget"] for row in rows if row["layout"] != DENSE})
    if densities is not None and (beyond := [density for density in densities if density not in there]):
        known = ", ".join(f"{density:g}" for density in there)
        raise ConfigError("densities", beyond[0], "not in the frontier", f"It has {known}.")
    if unknown := [name for name in layouts if name not in NAMES]:
        raise ConfigError("layouts", unknown[0], "unknown", f"There are {', '.join(NAMES)}.")
    found = []
    for wanted in [(DENSE, None), *((name, density) for density in densities or there for name in layouts)]:
        own = [row for row in rows if row["layout"] == wanted[0] and wanted[1] in (None, row["budget"])]
        for row in own[:draws] if wanted[0] == "random" else own:
            point = Point(row["layout"], row["budget"], row["draw"])
            if not (file := folder / row.get("file", f"{point.name}.yaml")).is_file():
                problem = f"{file} is missing"
                remedy = "Start in the folder where the frontier was measured, or measure it again."
                raise ConfigError("frontier", study.frontier["layouts"], problem, remedy)
            found.append(Continuation(point, row, file))
    return found


def write_settings(study: Study) -> None:
    """Write the settings that all runs share."""
    cfg = continued_settings(read_config(study.checkpoint), study)
    settings = asdict(cfg)
    del settings["layout"]  # each run's own
    with replacing(study.folder / f"{_SETTINGS}.yaml") as temporary:
        temporary.write_text(_HEADER + yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def continued_settings(trained: PretrainConfig, study: Study) -> PretrainConfig:
    """Return the dense run's settings, for further steps."""
    optim, last = trained.optim, study.last
    decay_steps = None if optim.decay_style == "constant" else optim.decay_steps or trained.train.steps
    return replace(
        trained,
        train=replace(trained.train, steps=last, exit_step=None, tokens=None),
        optim=replace(optim, decay_steps=decay_steps, decay_tokens=None, warmup_tokens=None, wsd_decay_tokens=None),
        checkpoint=replace(
            trained.checkpoint,
            interval=last,
            resume=str(study.checkpoint),
            new_data=True,
            weights_only=False,
            allow_changes=True,
            keep=1,
            keep_every=None,
        ),
        evaluation=replace(trained.evaluation, interval=last),
        tracking=replace(trained.tracking, log_interval=1, name=None),
        seed=trained.seed + _NEW_ORDER,
        plan=PlanConfig(),
    )


def run_folder(study: Study, run: Continuation) -> Path:
    """Folder of a run."""
    return study.folder / "runs" / run.name


def arguments(study: Study, run: Continuation) -> list[str]:
    """Arguments of launch/pretrain.py."""
    own = [f"layout={quoted(f'{PREFIX}{run.file}')}", f"run_dir={quoted(run_folder(study, run))}"]
    return [f"--config-dir={study.folder.absolute()}", f"--config-name={_SETTINGS}", *own, *study.settings]


@contextmanager
def claimed(study: Study, run: Continuation) -> Iterator[bool]:
    """Claim a run, and yield whether it is due.

    It is not if its result is there, or another process runs it.
    """
    with claim(study.folder / "locks" / f"{run.name}.lock") as is_free:
        yield is_free and not is_recorded(study, run)


def is_recorded(study: Study, run: Continuation) -> bool:
    """Whether a run's result is there."""
    return any(row["file"] == run.file.name for row in read_results(study.folder)["rows"])


def is_trained(study: Study, run: Continuation) -> bool:
    """Whether a run has measured its last held-out loss."""
    metrics = run_folder(study, run) / "metrics.jsonl"
    return metrics.is_file() and any(
        record.get("step") == study.last and record.get("held_out_loss") is not None for record in read_records(metrics)
    )


def record(study: Study, run: Continuation) -> dict[str, Any]:
    """Add a finished run's losses to the results."""
    reports = {
        record["step"]: record
        for record in read_records(run_folder(study, run) / "metrics.jsonl")
        if "event" not in record and record.get("step", 0) > study.first
    }
    losses = [reports[step]["loss"] for step in sorted(reports)]
    last = reports[study.last]
    row = {
        **{name: run.row[name] for name in ("layout", "budget", "draw", "density")},
        "file": run.file.name,
        "steps": study.steps,
        "first_loss": losses[0],
        "last_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "held_out_loss": last["held_out_loss"],
        "held_out_long": last.get("held_out_long"),
        "step_time_s": summarize(run_folder(study, run)).step_time_s,
        "lr": last["lr"],
        "losses": losses,
    }
    with _recording(study):
        rows = [other for other in read_results(study.folder)["rows"] if other["file"] != row["file"]]
        _write_rows(study, [*rows, row])
    return row


def _recording(study: Study) -> FileLock:
    """Lock of the results."""
    folder = study.folder / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / "record.lock")


def _write_rows(study: Study, rows: list[dict[str, Any]]) -> None:
    content = {**_about(study), "rows": rows, "environment": environment()}
    write_json(study.results, content)


def read_results(folder: Path) -> dict[str, Any]:
    """Read the finished runs; none if there is no file.

    Raises:
        ConfigError: the file holds something else.
    """
    path = folder / RESULTS
    if not path.is_file():
        return {"rows": []}
    with reading("output", path):
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = [(row["file"], row["density"]) for row in content["rows"]]  # what the program uses
    return content


def _about(study: Study) -> dict[str, Any]:
    return {
        "checkpoint": str(study.checkpoint),
        "weights": study.frontier["weights"],
        "first_step": study.first,
        "steps": study.steps,
        "settings": list(study.settings),
    }
