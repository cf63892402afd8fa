"""Reads `metrics.jsonl`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2train.errors import ConfigError


@dataclass
class Curves:
    """Losses of a run by step, in nats per token.

    Attributes:
        resumed: steps after which the run was resumed.
        other_held_out: those of them from which on held-out losses are of other texts.
        begins_after: steps of another run, whose checkpoint this one continues; 0 if it began itself.
        batches: (steps done, tokens of each step from then on), oldest first; empty if the file doesn't record them.
    """

    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    resumed: list[int] = field(default_factory=list)
    other_held_out: list[int] = field(default_factory=list)
    begins_after: int = 0
    batches: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of every step; None if unknown or not constant."""
        sizes = {size for _, size in self.batches}
        return sizes.pop() if len(sizes) == 1 else None

    def tokens(self, step: int) -> int:
        """Tokens of the first `step` steps; 0 if unknown."""
        if not self.batches:
            return 0
        ends = [start for start, _ in self.batches[1:]] + [step]
        return sum(size * max(0, min(end, step) - start) for (start, size), end in zip(self.batches, ends, strict=True))


def read_records(metrics: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl in order.

    Leaves out records of steps that a resumed run repeated.

    Raises:
        ConfigError: no such file, or a line has a step or a loss that is no number.
    """
    if not metrics.is_file():
        raise ConfigError("metrics", metrics, "no such file", "Name the metrics.jsonl of a run folder")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(metrics.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # truncated because the run was killed
        if not isinstance(record, dict):
            continue
        if not _is_record(record):
            problem = f"line {number} has a step or a loss that is no number"
            raise ConfigError("metrics", metrics, problem, "Remove that line, or name another run")
        if record.get("event") == "resume":
            records = [r for r in records if "event" in r or r.get("step", 0) <= record["step"]]
        records.append(record)
    return records


def _is_record(record: dict[str, Any]) -> bool:
    """Return whether a record's step and losses are numbers.

    A loss that was not finite is None. Reports and resumes have a step.
    """
    losses = [record[name] for name in ("loss", "held_out_loss") if name in record]
    has_step = type(record.get("step")) is int or not ("step" in record or losses or record.get("event") == "resume")
    return has_step and all(loss is None or type(loss) in (int, float) for loss in losses)


def last_evaluation(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the report of a run's last evaluation; None without one.

    Its `held_out_loss` is None if it was not finite: a diverged run ends so, and no earlier loss stands for it.
    """
    return next((record for record in reversed(records) if "held_out_loss" in record), None)


def read_curves(metrics: Path) -> Curves:
    """Read losses, tokens per step and resumes from a metrics.jsonl.

    Reads `loss` and `held_out_loss` by step, `tokens_per_step` from any record, and events named `resume`, `batch size`
    and `other held-out data`.

    Raises:
        ConfigError: no such file.
    """
    curves = Curves()
    size: int | None = None
    starts = 0
    for record in read_records(metrics):
        step = record.get("step")
        size = record.get("tokens_per_step", size)
        if size is not None and not curves.batches:
            curves.batches = [(0, size)]
        if record.get("event") == "batch size":
            curves.batches.append((record["step"], record["tokens_per_step"]))
        starts += record.get("event") == "config"
        if record.get("event") == "resume":
            if starts == 1:  # the folder's first start
                curves.begins_after = record["step"]
            curves.resumed.append(record["step"])
            curves.other_held_out = [one for one in curves.other_held_out if one < record["step"]]
            if size is not None:  # recorded just before the resume
                earlier = [batch for batch in curves.batches if batch[0] < record["step"]]
                curves.batches = [*earlier, (record["step"], size)]
        if record.get("event") == "other held-out data":
            curves.other_held_out.append(record["step"])
        if "event" not in record and step is not None:
            for name, losses in (("loss", curves.train), ("held_out_loss", curves.held_out)):
                if record.get(name) is not None:
                    losses[step] = record[name]
    return curves
