"""Describes a sweep's jobs, with their state from their folders."""

import json
import re
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from s2train.checkpoints.listing import checkpoints_of
from s2train.checkpoints.setting_changes import changes_results
from s2train.command_line.old_names import OLD_NAMES, rename_saved, renamed
from s2train.comparison.runs import Summary, summarize
from s2train.config import PretrainConfig, settings_by_name
from s2train.costs.memory import GIB
from s2train.errors import ConfigError
from s2train.files import write_json
from s2train.planning import Plan
from s2train.sweeps.names import setting_and_value
from s2train.training.records import read_records

RECORD, LOG = "sweep.json", "log.txt"
RANK_LOGS = "logs"  # logs of each rank in a job on several nodes: HOST/START/attempt_N/RANK/stderr.log
_SET_BY_SWEEP = ("run_dir", "tracking.group")  # settings that the sweep sets for each job


class Status(StrEnum):
    """State of a job."""

    WAITING = "waiting"
    PLANNED = "planned"  # plan=true: checked, not started
    REJECTED = "rejected"  # its settings can't work
    WRITTEN = "written"  # its batch script is written
    SUBMITTED = "submitted"
    STOPPED = "stopped"  # the sweep was interrupted
    FAILED = "failed"
    FINISHED = "finished"

    @classmethod
    def _missing_(cls, value: object) -> "Status | None":
        return cls.REJECTED if value == "refused" else None  # its name in records of earlier versions


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        label: the swept settings as typed.
        swept: values of the swept settings.
        arguments: arguments of the program.
        layers: one letter per layer; empty if the settings were rejected.
        density: kept / causal positions of the whole model; None if the settings were rejected.
        last_step: step at which the run is finished.
        error: why the job was rejected or failed, in one line.
        is_earlier: whether an earlier sweep into the same folder ran it.
        planned_memory_gib: peak memory of the fullest rank; None before it is planned.
        predicted_step_time_s, predicted_tokens_per_s: of the plan; None if it predicts no time.
    """

    folder: Path
    label: str
    swept: dict[str, str]
    arguments: list[str]
    layers: str = ""
    density: float | None = None
    last_step: int = 0
    status: Status = Status.WAITING
    error: str = ""
    is_earlier: bool = False
    planned_memory_gib: float | None = None
    predicted_step_time_s: float | None = None
    predicted_tokens_per_s: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run has saved its last step.

        Or done it, if the run saves nothing.
        """
        metrics, config = self.folder / "metrics.jsonl", self.folder / "config.yaml"
        if not metrics.is_file():
            return False
        saves = not config.is_file() or OmegaConf.select(OmegaConf.load(config), "checkpoint.save", default=True)
        # a report has no event name
        done = [r["step"] for r in read_records(metrics) if r.get("event") == ("checkpoint" if saves else None)]
        return max(done, default=-1) >= self.last_step > 0

    @property
    def labelled_error(self) -> str:
        """The error after the swept settings that it does not begin with."""
        texts = [f"{setting}={value}" for setting, value in self.swept.items()] or [self.label]
        others = " ".join(text for text in texts if not self.error.startswith(f"{text}: "))
        return f"{others}: {self.error}" if others else self.error

    def add_plan(self, plan: Plan) -> None:
        """Set what is known before the run."""
        self.layers, self.density, self.last_step = plan.letters, plan.density, plan.cfg.train.last_step
        self.planned_memory_gib = plan.memory.total / GIB
        if plan.prediction is not None:
            self.predicted_step_time_s = plan.prediction.time.total
            self.predicted_tokens_per_s = plan.prediction.tokens_per_s

    def summary(self) -> Summary | None:
        """Summarize the run so far; None if it has reported nothing."""
        try:
            return summarize(self.folder)
        except ConfigError:
            return None

    def loss(self) -> float | None:
        """Held-out loss of a finished run, or else its last loss.

        It is in nats per token; None if the run is not finished.
        """
        summary = self.summary() if self.status is Status.FINISHED else None
        return None if summary is None else summary.ranking_loss[1]

    def loss_text(self) -> str:
        """Format the loss: `held out 2.1234`."""
        summary = self.summary() if self.status is Status.FINISHED else None
        name, value = ("loss", None) if summary is None else summary.ranking_loss
        return "no loss" if value is None else f"{name} {value:.4f}"


def relabel(jobs: list[Job]) -> list[Job]:
    """Label jobs of several sweeps by all arguments in which they differ.

    A setting swept in one sweep may be fixed in another, whose labels then lack it.
    """
    given = [dict(setting_and_value(word) for word in job.arguments if "=" in word) for job in jobs]
    swept = {setting for job in jobs for setting in job.swept}
    names = [
        name
        for name in dict.fromkeys(name for values in given for name in values)
        if name in swept or (name not in _SET_BY_SWEEP and len({values.get(name) for values in given}) > 1)
    ]
    named = [{name: values[name] for name in names if name in values} for values in given]
    return [
        replace(job, swept=values, label=" ".join(f"{name}={value}" for name, value in values.items()))
        for job, values in zip(jobs, named, strict=True)
    ]


def changed_setting(folder: Path, cfg: PretrainConfig) -> str | None:
    """Find a setting of a finished run that differs from `cfg`.

    Returns it as the run in `folder` had it, such as `optim.lr=0.001`. Files in conf/ may change under the same
    overrides; so may the content of its data. Ignores settings that only one of the two has, settings that change no
    result, and paths of data that were moved with the folder. Returns None if nothing differs.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    saved: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    rename_saved(saved)
    # Through JSON, which turns tuples into lists.
    before, now = (dict(settings_by_name(node)) for node in (saved, json.loads(json.dumps(asdict(cfg)))))
    names = [name for name in now if name in before and before[name] != now[name] and changes_results(name)]
    if checkpoints := checkpoints_of(folder):
        from s2train.checkpoints.folders import read_progress  # imports tokenizers and checkpoints: slow
        from s2train.sweeps.trained_data import moved_data, replaced_data

        progress = read_progress(checkpoints[-1])
        moved = moved_data(progress, before, cfg) if any(name.startswith("data.") for name in names) else set()
        names = [name for name in names if name not in moved]
        if not names and (replaced := replaced_data(progress, cfg)) is not None:
            return f"other content of {replaced}={before[replaced]}"
    return next((f"{name}={before[name]}" for name in names), None)


def last_error(log: Path) -> str:
    """Find the line of a job's log that says why it failed.

    It is the last `error: …`, or else the first exception, or else the last line. A job on several nodes logs only the
    first rank of each node, so the logs of all ranks are searched before the last line is used.
    """
    lines = _lines(log)
    ranks = [line for rank in _rank_logs(log.parent / RANK_LOGS) for line in _lines(rank)]
    return _cause(lines) or _cause(ranks) or next(iter(lines[-1:]), "it wrote nothing")


def _lines(log: Path) -> list[str]:
    """Read a log's lines without empty ones and without rank prefixes.

    Both torchrun and torch may add a prefix.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [re.sub(r"^(\[rank\d+\]:\s?)+", "", line).rstrip() for line in text.splitlines() if line.strip()]


def _cause(lines: list[str]) -> str | None:
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    # ChildFailedError is torchrun's and names no cause.
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line) and "ChildFailed" not in line]
    return next(iter(errors[-1:] + raised[:1]), None)


def _rank_logs(folder: Path) -> list[Path]:
    """Logs of the newest attempt's ranks on all nodes.

    The rank that ended first comes first.
    """
    newest = max((attempt.stat().st_mtime for attempt in folder.glob("*/*/attempt_*")), default=0.0)
    written = [(log.stat().st_mtime, log) for log in folder.glob("*/*/attempt_*/*/stderr.log")]
    # A log last written before that attempt began belongs to an earlier one, or to a node that left the job.
    return [log for time, log in sorted(written) if time >= newest]


def write_record(sweep_dir: Path, jobs: list[Job]) -> None:
    """Write a sweep's jobs to its folder."""
    content = [asdict(job) | {"folder": job.folder.name} for job in jobs]
    write_json(sweep_dir / RECORD, {"jobs": content})


def read_record(sweep_dir: Path) -> list[Job]:
    """Read the jobs that `write_record` wrote; empty if there is no record."""
    path = sweep_dir / RECORD
    if not path.is_file():
        return []
    content: list[dict[str, Any]] = json.loads(path.read_text())["jobs"]
    return [
        Job(
            **job
            | {
                "folder": sweep_dir / job["folder"],
                "status": Status(job["status"]),
                "swept": {OLD_NAMES.get(name, name): value for name, value in job["swept"].items()},
                "arguments": renamed(job["arguments"], OLD_NAMES),
            }
        )
        for job in content
    ]
