"""The jobs of a sweep, and how far each is, judged from the plain files of its run folder."""

import json
import re
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from s2train.comparison.runs import Summary, summarize
from s2train.config import PretrainConfig, settings_by_name
from s2train.errors import ConfigError
from s2train.files import replacing
from s2train.sweeps.names import setting_and_value
from s2train.training.records import read_records

RECORD, LOG = "sweep.json", "log.txt"
RANK_LOGS = "logs"  # of each rank, in a job of several nodes: HOST/START/attempt_N/RANK/stderr.log
_OWN = ("run_dir", "tracking.group")  # settings that the sweep gives each job
# Settings that change no result. Of data.end_token a run saves what its data tell.
_NO_RESULT = ("run_dir", "tracking.", "checkpoint.", "plan", "data.end_token")


class Status(StrEnum):
    """What became of a job."""

    WAITING = "waiting"
    PLANNED = "planned"  # plan=true: judged, not started
    REFUSED = "refused"  # its settings can't work
    WRITTEN = "written"  # its batch script
    SUBMITTED = "submitted"
    STOPPED = "stopped"  # the sweep was interrupted
    FAILED = "failed"
    FINISHED = "finished"


@dataclass
class Job:
    """One run of a sweep.

    Attributes:
        label: the swept settings, as typed.
        swept: the same, by setting.
        arguments: of the program.
        layers: a letter a layer; empty if the settings were refused.
        density: kept / causal positions of the whole model; None if the settings were refused.
        last_step: at which the run is finished.
        error: why it was refused, or failed, in one line.
        is_earlier: of a sweep before, into the same folder.
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

    @property
    def is_finished(self) -> bool:
        """Whether the run has saved its last step or, if it was to save nothing, done it, by its plain files."""
        metrics, config = self.folder / "metrics.jsonl", self.folder / "config.yaml"
        if not metrics.is_file():
            return False
        saves = not config.is_file() or OmegaConf.select(OmegaConf.load(config), "checkpoint.save", default=True)
        # a report has a step and a loss, other events have names
        done = [r["step"] for r in read_records(metrics) if r.get("event") == ("checkpoint" if saves else None)]
        return max(done, default=-1) >= self.last_step > 0

    def summary(self) -> Summary | None:
        """What the run has come to so far; None if it has reported nothing."""
        try:
            return summarize(self.folder)
        except ConfigError:
            return None

    def loss(self) -> float | None:
        """Held-out loss of a finished run, nats per token, or its last loss if none was measured; else None."""
        summary = self.summary() if self.status is Status.FINISHED else None
        return None if summary is None else summary.judged_by[1]

    def told_loss(self) -> str:
        """The same in words: `held out 2.1234`."""
        summary = self.summary() if self.status is Status.FINISHED else None
        name, value = ("loss", None) if summary is None else summary.judged_by
        return "no loss" if value is None else f"{name} {value:.4f}"


def told_apart(jobs: list[Job]) -> list[Job]:
    """The same jobs, each named by whatever of its arguments some other lacks or has otherwise.

    For jobs of several sweeps: what one swept may be fixed in another, and told by neither.
    """
    given = [dict(setting_and_value(word) for word in job.arguments if "=" in word) for job in jobs]
    swept = {setting for job in jobs for setting in job.swept}
    names = [
        name
        for name in dict.fromkeys(name for values in given for name in values)
        if name in swept or (name not in _OWN and len({values.get(name) for values in given}) > 1)
    ]
    named = [{name: values[name] for name in names if name in values} for values in given]
    return [
        replace(job, swept=values, label=" ".join(f"{name}={value}" for name, value in values.items()))
        for job, values in zip(jobs, named, strict=True)
    ]


def changed_setting(folder: Path, cfg: PretrainConfig) -> str | None:
    """What the run in `folder` was trained with, where that differs from `cfg`: `optim.lr=0.001`; None if nothing does.

    For files in conf/ may change under the same overrides. Settings that only one of the two knows are left out, and
    those that change no result.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    saved: Any = OmegaConf.to_container(OmegaConf.load(path))
    # Through JSON, where tuples and lists are one.
    before, now = (dict(settings_by_name(node)) for node in (saved, json.loads(json.dumps(asdict(cfg)))))
    for name in now:
        if name in before and before[name] != now[name] and not name.startswith(_NO_RESULT):
            return f"{name}={before[name]}"
    return None


def last_error(log: Path) -> str:
    """The line of a job's log that says why it failed: its last `error: …`, else the first exception, else the end.

    The log of several nodes has their first ranks' lines alone; what tells nothing is looked for in the other ranks'
    own before the end is taken.
    """
    lines = _lines(log)
    ranks = [line for rank in _rank_logs(log.parent / RANK_LOGS) for line in _lines(rank)]
    return _cause(lines) or _cause(ranks) or next(iter(lines[-1:]), "it wrote nothing")


def _lines(log: Path) -> list[str]:
    """A log's lines, without the ranks before them (torchrun writes one, and torch another) and without empty ones."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return [re.sub(r"^(\[rank\d+\]:\s?)+", "", line).rstrip() for line in text.splitlines() if line.strip()]


def _cause(lines: list[str]) -> str | None:
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    # ChildFailedError is torchrun's own and tells no cause.
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)(:|$)", line) and "ChildFailed" not in line]
    return next(iter(told[-1:] + raised[:1]), None)


def _rank_logs(folder: Path) -> list[Path]:
    """What the ranks of the newest attempt wrote, on all nodes; first the rank that ended first."""
    newest = max((attempt.stat().st_mtime for attempt in folder.glob("*/*/attempt_*")), default=0.0)
    written = [(log.stat().st_mtime, log) for log in folder.glob("*/*/attempt_*/*/stderr.log")]
    # What was last written to before that attempt began is an earlier one's, or of a node that is no longer the job's.
    return [log for time, log in sorted(written) if time >= newest]


def write_record(sweep_dir: Path, jobs: list[Job]) -> None:
    """Write a sweep's jobs to its folder."""
    with replacing(sweep_dir / RECORD) as temporary:
        content = [asdict(job) | {"folder": job.folder.name} for job in jobs]
        temporary.write_text(json.dumps({"jobs": content}, indent=1) + "\n")


def read_record(sweep_dir: Path) -> list[Job]:
    """The jobs that `write_record` wrote; none if it did not."""
    path = sweep_dir / RECORD
    if not path.is_file():
        return []
    content: list[dict[str, Any]] = json.loads(path.read_text())["jobs"]
    return [Job(**job | {"folder": sweep_dir / job["folder"], "status": Status(job["status"])}) for job in content]
