"""Reports metrics on the console, in metrics.jsonl and in wandb."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from s2train.batch_sizes import batch_size
from s2train.checkpoints.folders import Progress
from s2train.checkpoints.setting_changes import Change
from s2train.config import PretrainConfig
from s2train.distributed.ranks import world_size
from s2train.environment.imports import imported_modules
from s2train.environment.versions import git_commit, versions
from s2train.files import set_aside, without_nan
from s2train.training.auxiliary_losses import column_means, layer_values
from s2train.training.records import read_records
from s2train.training.tensorboard import TensorBoard
from s2train.wandb_run import CONSUMED_TOKENS, RunInfo, WandbRun, choose_mode, place_of, say

# wandb's names for the fields of `StepMetrics`, by section.
_WANDB_KEYS = {
    "consumed_tokens": CONSUMED_TOKENS,
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "skipped": "train/skipped_steps",
    "held_out_loss": "validation/loss",
    "held_out_short": "validation/loss_first_eighth",
    "held_out_long": "validation/loss_last_half",
    "step_time_s": "perf/step_time_s",
    "tokens_per_s": "perf/tokens_per_s",
    "model_tflops": "perf/model_tflops",
    "mfu": "perf/mfu",
    "memory_gib": "perf/memory_gib",
    "eta_s": "perf/eta_s",
}


@dataclass
class StepMetrics:
    """Means over the steps since the last report.

    Attributes:
        step: steps done.
        consumed_tokens: tokens of the run's data so far; a new phase starts from 0.
        loss, held_out_loss: nats per token; held_out_loss only if it was just measured.
        step_time_s: seconds.
        tokens_per_s: throughput of the whole job.
        model_tflops: TFLOP/s per device, from the exact FLOPs of the layout, without recomputation.
        mfu: model_tflops over the device's dense peak; None if the peak is unknown.
        skipped: steps of the whole run skipped because the loss or gradient was not finite, or no token counted.
        held_out_loss_by_position, held_out_short, held_out_long: see `s2train.training.loss_by_position.HeldOut`.
        timed_from: in the first report after a resume, the first step of its times and rates, if its losses include
            earlier ones; else None.
        eta_s: seconds to the last step of this job, which `train.exit_step` may set.
        auxiliary: losses and values of kinds of attention, by `s2train.training.auxiliary_losses`' names.
        memory_gib: peak memory allocated on this rank's device; 0 on a CPU.
    """

    step: int
    consumed_tokens: int
    loss: float
    held_out_loss: float | None
    lr: float
    grad_norm: float
    step_time_s: float
    tokens_per_s: float
    model_tflops: float
    mfu: float | None
    memory_gib: float
    eta_s: float
    held_out_loss_by_position: list[tuple[int, int, float | None]] | None = None
    held_out_short: float | None = None
    held_out_long: float | None = None
    skipped: int = 0
    timed_from: int | None = None
    auxiliary: dict[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Values that are not None, by their names in metrics.jsonl.

        `auxiliary` becomes the mean of each column, and its layers' values.
        """
        values = {name: value for name, value in asdict(self).items() if value is not None and name != "auxiliary"}
        for name, mean in column_means(self.auxiliary).items():
            values[name] = mean
            values[f"{name}_by_layer"] = dict(layer_values(self.auxiliary, name))
        return values

    def wandb_row(self) -> dict[str, Any]:
        """Values by their names in wandb.

        The loss of the positions from START on is `validation/loss_at/START`.
        """
        values = self.values()
        values.pop("timed_from", None)
        for name in column_means(self.auxiliary):
            values[f"train/{name}"] = values.pop(name)
            values |= {f"train/{name}/layer_{layer}": value for layer, value in values.pop(f"{name}_by_layer").items()}
        ranges = values.pop("held_out_loss_by_position", [])
        row = {_WANDB_KEYS.get(name, name): value for name, value in values.items()}
        return row | {f"validation/loss_at/{start}": loss for start, _, loss in ranges}

    def line(self, steps: int, last_step: int) -> str:
        """Format one console line.

        Args:
            steps: steps of the whole run.
            last_step: step at which this job ends, to which the ETA counts.
        """
        since = "" if self.timed_from is None else f" from step {self.timed_from}"
        parts = [f"step {self.step:>{len(str(steps))}}/{steps}", f"loss {self.loss:.4f}"]
        parts += [f"{name} {_rounded(value)}" for name, value in column_means(self.auxiliary).items()]
        if self.held_out_loss is not None:
            parts.append(f"held out {self.held_out_loss:.4f}")
        parts += [
            f"lr {self.lr:.2e}",
            f"grad norm {self.grad_norm:.3f}",
            f"{self.step_time_s * 1e3:,.0f} ms/step{since}",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"{self.model_tflops:.3g} TFLOP/s",
        ]
        if self.mfu is not None:
            parts.append(f"MFU {self.mfu:.1%}")
        if self.memory_gib:
            parts.append(f"{self.memory_gib:.1f} GiB")
        if self.skipped:
            parts.append(f"skipped {self.skipped}")
        until = f" to step {last_step}" if last_step < steps else ""
        parts.append(f"ETA {timedelta(seconds=round(self.eta_s))}{until}")
        return " | ".join(parts)


def _rounded(value: float) -> str:
    """Format a value; a small one keeps its digits."""
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


class Tracker:
    """Writes console lines, metrics.jsonl and wandb rows on one rank.

    On the other ranks, construct it with `active=False`: every call does nothing.

    Args:
        start: progress from which the run starts; at step 0, an earlier metrics.jsonl is renamed.
        active: whether this rank writes.
        plan: figures of the run for wandb, by name.
    """

    def __init__(
        self, cfg: PretrainConfig, start: Progress, *, active: bool, plan: dict[str, Any] | None = None
    ) -> None:
        self._active = active
        self._steps, self._last_step = cfg.train.steps, cfg.train.last_step
        self.wandb_id = start.wandb_id
        self._place = place_of(start.step, start.consumed_samples * cfg.train.seq_length)
        self._run: WandbRun | None = None
        self._board: TensorBoard | None = None
        if not active:
            return
        folder = Path(cfg.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        earlier = set_aside(path) if start.step == 0 else None
        whole = path.read_bytes().endswith(b"\n") if path.exists() and path.stat().st_size else True
        self._file = path.open("a", buffering=1)
        if not whole:  # the run was killed while it wrote a line
            self._file.write("\n")
        tokens_per_step = batch_size(cfg.train, start.consumed_samples) * cfg.train.seq_length
        self.event("config", tokens_per_step=tokens_per_step, processes=world_size())
        if start.step:
            self.event("resume", step=start.step)
        if earlier is not None:
            self._log_earlier(earlier)
        code = {"commit": git_commit(), **versions()}
        self.event("code", **code)
        if (mode := choose_mode(cfg.tracking.wandb)) != "disabled":
            info = RunInfo(
                mode=mode,
                id=start.wandb_id,
                folder=folder,
                config={**asdict(cfg), "code": code, "figures": plan or {}},
                tracking=cfg.tracking,
            )
            self._run = WandbRun(info, self.note)
            self.wandb_id = self._run.id
        if cfg.tracking.tensorboard:
            self._board = TensorBoard(folder / "tensorboard", start.step)

    def event(self, name: str, **fields: object) -> None:
        """Record an event other than metrics, such as a resume."""
        self._write({"event": name, **fields})

    def first_step(self, seconds: dict[str, float]) -> None:
        """Record what the start took, and the modules that it imported.

        Args:
            seconds: of each part.
        """
        if self._active:  # looks for a file of each module
            modules = imported_modules()
            self.event("first step", seconds=seconds, **asdict(modules))
            self.note(modules.advice())

    def checkpoint(self, step: int, path: Path) -> None:
        """Record that a checkpoint is complete."""
        self.event("checkpoint", step=step, path=str(path))
        if self._run is not None:
            self._run.checkpoint(path, step)

    def changes(self, step: int, checkpoint: Path, changes: Sequence[Change]) -> None:
        """Log settings that differ from those of the checkpoint at `step`."""
        if not changes:
            return
        for change in changes:
            self.note(f"changed since {checkpoint.name}: {change}")
        pairs = {change.setting: [change.before, change.now] for change in changes}
        self.event("changed settings", step=step, checkpoint=str(checkpoint), settings=pairs)
        if self._board is not None:
            self._board.text("config/changed_settings", "\n\n".join(map(str, changes)), step)
        rows = [[step, str(change)] for change in changes]
        self.table("config/changed_settings", ["after step", "setting"], rows)

    def report(self, metrics: StepMetrics) -> None:
        """Print and record metrics."""
        if not self._active:
            return
        self._place = place_of(metrics.step, metrics.consumed_tokens)
        say(metrics.line(self._steps, self._last_step))
        self._write(metrics.values())
        if self._run is not None:
            self._run.log(metrics.wandb_row())
        if self._board is not None:
            self._board.log(metrics.step, metrics.wandb_row())

    def note(self, text: str | None) -> None:
        """Print a line on the console."""
        if self._active and text:
            say(text)

    def picture(self, name: str, path: Path) -> None:
        """Show a PNG in wandb."""
        if self._run is not None:
            self._run.picture(name, path, self._place)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Show a table in wandb."""
        if self._run is not None:
            self._run.table(name, columns, rows, self._place)

    def close(self, seconds: float | None = None) -> None:
        """Close the files and the wandb run.

        Args:
            seconds: time limit for the wandb run; None means its usual limit.
        """
        if self._run is not None:
            self._run.close(seconds)
        if self._board is not None:
            self._board.close()
        if self._active:
            self._file.close()

    def _log_earlier(self, kept: Path) -> None:
        """Log a start from step 1 in an earlier run's folder.

        `kept` is the file that holds the earlier run's metrics.
        """
        last = max((record["step"] for record in read_records(kept) if "loss" in record), default=0)
        self.event("earlier run", metrics=kept.name, last_step=last)
        self.note(
            f"starting from step 1: {kept.parent} has no checkpoint to resume from. The metrics of an earlier run"
            f" there, to step {last}, are kept as {kept.name}"
        )

    def _write(self, values: dict[str, object]) -> None:
        if self._active:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._file.write(json.dumps({"time": now, **without_nan(values)}) + "\n")
