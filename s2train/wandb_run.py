"""Logs to wandb from a background thread; training never waits for it.

The run's own files hold the same numbers, so a failure here only prints one line.
"""

import os
import queue
import secrets
import shlex
import string
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2train.config import TrackingConfig
from s2train.errors import ConfigError, first_line

STEP, CONSUMED_TOKENS = "step", "data/consumed_tokens"  # in every row, as x-axis of charts
_X_AXES = {"step": STEP, "consumed_tokens": CONSUMED_TOKENS}
MODES = ("auto", "disabled", "offline", "online")
INIT_TIMEOUT_S = 60.0  # then the run is logged offline, to be sent by `wandb sync` later
CLOSE_TIMEOUT_S = 120.0  # for sending the remaining data at the end
_CAPACITY = 10_000  # queued tasks; further ones are dropped


def say(text: str) -> None:
    """Print a line in one write, which other threads can't split."""
    print(f"{text}\n", end="", flush=True)


@dataclass(frozen=True)
class RunInfo:
    """Identifies a wandb run.

    Attributes:
        mode: offline or online.
        id: None for a new run.
        folder: the run folder; wandb writes to `wandb` in it.
        tracking: project, entity, group, name, tags, notes and x-axis.
    """

    mode: str
    id: str | None
    folder: Path
    config: dict[str, Any]
    tracking: TrackingConfig


def choose_mode(wanted: str, setting: str = "tracking.wandb") -> str:
    """Resolve a setting to disabled, offline or online, without network access.

    auto: the value of WANDB_MODE if set; else online with an API key, offline without one, and disabled if wandb can't
    be imported.

    Raises:
        ConfigError: unknown mode; or an explicit mode that needs wandb or an API key, which is missing.
    """
    if wanted not in MODES:
        raise ConfigError(setting, wanted, "unknown value", f"It may be {', '.join(MODES)}")
    if wanted == "disabled":
        return wanted
    remedy = f"Set {setting}=offline, or disabled; the run's own files always have the same numbers"
    try:
        import wandb
    except ImportError as error:
        if wanted == "auto":
            return "disabled"
        raise ConfigError(setting, wanted, f"wandb can't be imported ({error})", remedy) from error
    if wanted == "offline":
        return wanted
    if wanted == "auto" and (mode := os.environ.get("WANDB_MODE")) in ("disabled", "offline", "online"):
        return str(mode)
    has_account = wandb.login(prompt=False, verify=False)
    if wanted == "online" and not has_account:
        raise ConfigError(setting, wanted, "no API key is configured", f"wandb login. {remedy}")
    return "online" if has_account else "offline"


class WandbRun:
    """A wandb run created in the background, whose id is known immediately.

    Calls are queued and executed in order. Only `close` waits, for a limited time.

    Args:
        say: called with one line when something fails.
    """

    def __init__(self, info: RunInfo, say: Callable[[str], None] = say) -> None:
        self.id = info.id or new_id()
        self._info, self._say = info, say
        self._run: Any = None
        self._todo: queue.Queue[Callable[[Any, Any], None] | None] = queue.Queue(_CAPACITY)
        self._is_full = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, Any]) -> None:
        """Log a row of metrics, with `STEP` and `CONSUMED_TOKENS` as x-axis."""
        self._do(lambda wandb, run: run.log(values))

    def picture(self, name: str, path: Path, place: dict[str, int]) -> None:
        """Log a PNG; it may be read later. `place`: from `place_of`."""
        self._do(lambda wandb, run: run.log({name: wandb.Image(str(path)), **place}))

    def table(self, name: str, columns: list[str], rows: list[list[Any]], place: dict[str, int]) -> None:
        """Log a table of numbers and text; `place` comes from `place_of`."""
        self._do(lambda wandb, run: run.log({name: wandb.Table(columns=columns, data=rows), **place}))

    def checkpoint(self, path: Path, step: int) -> None:
        """Log a reference to a checkpoint, without reading or sending its files."""

        def add(wandb: Any, run: Any) -> None:
            artifact = wandb.Artifact(f"checkpoint-{run.id}", type="model", metadata={"step": step, "path": str(path)})
            artifact.add_reference(path.resolve().as_uri(), checksum=False)
            run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

        self._do(add)

    def close(self, seconds: float | None = None) -> None:
        """Send the remaining data, within `seconds` at most; None: `CLOSE_TIMEOUT_S`."""
        seconds = CLOSE_TIMEOUT_S if seconds is None else seconds
        until = time.monotonic() + seconds
        try:
            self._todo.put(None, timeout=seconds)
        except queue.Full:
            self._say(f"wandb: sending takes too long; the rest is not sent ({self._remedy()})")
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"wandb: not everything was sent within {seconds:.0f} s ({self._remedy()})")

    def _do(self, task: Callable[[Any, Any], None]) -> None:
        try:
            self._todo.put_nowait(task)
        except queue.Full:
            if not self._is_full:
                self._is_full = True
                self._say("wandb: sending is far behind; further metrics are dropped there")

    def _work(self) -> None:
        try:
            import wandb  # slow

            self._run = self._begin(wandb)
        except Exception as error:
            self._say(f"wandb: can't create a run ({first_line(error)}); continuing without wandb")
        has_failed = False
        while (task := self._todo.get()) is not None:
            if self._run is None:
                continue
            try:
                task(wandb, self._run)
            except Exception as error:
                if not has_failed:
                    self._say(f"wandb: {first_line(error)}; continuing")
                has_failed = True
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._say(f"wandb: {first_line(error)} ({self._remedy()})")

    def _begin(self, wandb: Any) -> Any:
        try:
            return self._init(wandb, self._info.mode)
        except Exception as error:
            if self._info.mode != "online":
                raise
            self._say(f"wandb: no connection ({first_line(error)}): this run is logged offline ({self._remedy()})")
            return self._init(wandb, "offline")

    def _init(self, wandb: Any, mode: str) -> Any:
        info, tracking = self._info, self._info.tracking
        run = wandb.init(
            project=tracking.project,
            entity=tracking.entity,
            group=tracking.group,
            name=tracking.name or info.folder.name,
            tags=tracking.tags or None,
            notes=tracking.notes,
            id=self.id,
            resume="allow",
            mode=mode,
            dir=str(info.folder),
            config=info.config,
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S, finish_timeout=CLOSE_TIMEOUT_S, console="off", silent=mode == "offline"
            ),
        )
        # Repeated steps after a crash overwrite the old ones; wandb's own step can only increase.
        for axis in _X_AXES.values():
            run.define_metric(axis)
        run.define_metric("*", step_metric=_X_AXES[tracking.x_axis])
        return run

    def _remedy(self) -> str:
        return f"wandb sync {shlex.quote(str(self._info.folder))}/wandb/*run-*-{self.id}"


def place_of(step: int, consumed_tokens: int) -> dict[str, int]:
    """Return a row's position on either x-axis."""
    return {STEP: step, CONSUMED_TOKENS: consumed_tokens}


def new_id() -> str:
    """Generate an id in wandb's format."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
