"""Where a run starts from, and whether it may."""

import os
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from s2train.checkpoints.folders import (
    Progress,
    checkpoints_in,
    find_checkpoint,
    is_own,
    older_instead,
    own_checkpoints,
    read_config,
    read_progress,
    step_of,
)
from s2train.checkpoints.integrity import damage, doubt
from s2train.checkpoints.setting_changes import Change, changes_between, check_consent
from s2train.config import PretrainConfig
from s2train.data.blend import parse_blend
from s2train.data.checks import num_train_samples
from s2train.data.splits import megatron_split
from s2train.errors import ConfigError
from s2train.files import FolderLock

# What the shards depend on: these must agree between a checkpoint and the run that loads it.
_ARCHITECTURE = ("model", "layout", "schedule")
_NOT_IN_SHARDS = {"model.name", "model.init_std"}
_OF_A_PHASE = {"model.rotary_base"}  # raised for longer sequences (arXiv 2309.16039, section 2.1)
_NUM_SAMPLES = "data.num_samples"
_PATH = "data.path"
_CONTENTS = "the datasets' contents"  # in saved orders, beside settings


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: to load, None for a fresh run.
        progress: the run's, were it saved now.
        rng_ranks: of the checkpoint's progress.
        changes: settings that differ from the checkpoint's; none for a fresh run.
    """

    checkpoint: Path | None
    progress: Progress
    rng_ranks: list[int] | None = None
    changes: list[Change] = field(default_factory=list)


def find_start(cfg: PretrainConfig) -> Start:
    """Where this run starts; looks at files only.

    Raises:
        ConfigError: `checkpoint.resume` names nothing or goes back in the run's own folder; the checkpoint is damaged
            or of another architecture; the data or their order are others; the experiment of the run folder has other
            settings, and `checkpoint.allow_changes` does not name them; there is nothing left to do.
    """
    checkpoint = _find(cfg)
    if checkpoint is None:
        return Start(None, Progress(0, 0, data_order(cfg), None))
    if problem := damage(checkpoint):
        raise ConfigError("checkpoint.resume", checkpoint, problem, older_instead(checkpoint, "checkpoint.resume"))
    saved, lies_here = read_progress(checkpoint, "checkpoint.resume"), is_own(checkpoint, cfg.run_dir)
    is_new_phase = cfg.checkpoint.new_data and not lies_here
    changes = changes_between(read_config(checkpoint, "checkpoint.resume"), cfg)
    _check_same_architecture(changes, checkpoint, weights_only=saved.weights_only, is_new_phase=is_new_phase)
    if saved.weights_only:
        return Start(checkpoint, Progress(0, 0, data_order(cfg), None))
    last = cfg.train.last_step
    if not lies_here and saved.step >= last:
        problem = f"{checkpoint} is at step {saved.step} already, so there is nothing to train"
        raise ConfigError("train.steps", last, problem, f"Set more than {saved.step} (train.exit_step too)")
    if is_new_phase:
        order = data_order(cfg, saved.step)
        progress = Progress(saved.step, 0, order, None, first_step=saved.step)
        return Start(checkpoint, progress, saved.rng_ranks, changes)
    order = data_order(cfg, saved.first_step)
    if cfg.data.num_samples is None:  # the run's length may have changed; its order stays
        order[_NUM_SAMPLES] = saved.order.get(_NUM_SAMPLES)
    _check_same_order(saved.order, order, checkpoint)
    if lies_here:  # a branch in another run folder is an experiment of its own
        check_consent(cfg, checkpoint, [change for change in changes if change.setting not in order])
    # A branch of another run is a run of its own in wandb.
    progress = replace(saved, order=order, wandb_id=saved.wandb_id if lies_here else None)
    return Start(checkpoint, progress, saved.rng_ranks, changes)


def data_order(cfg: PretrainConfig, first_step: int = 0) -> dict[str, Any]:
    """What fixes the order of the training samples from `first_step` on, by setting, and the datasets' contents."""
    blend = parse_blend(cfg.data.path)
    return {
        _PATH: [[weight, prefix] for weight, prefix in zip(blend.weights, blend.prefixes, strict=True)],
        _CONTENTS: [_contents(prefix) for prefix in blend.prefixes],
        "data.split": megatron_split(cfg.data.split),
        _NUM_SAMPLES: num_train_samples(cfg, first_step),
        "train.seq_length": cfg.train.seq_length,
        "seed": cfg.seed,
    }


def _contents(prefix: str) -> str:
    """Tells a dataset from another, under its name or under another one."""
    with open(f"{prefix}.idx", "rb") as index, open(f"{prefix}.bin", "rb") as tokens:
        sums = (zlib.crc32(file.read(1 << 20)) for file in (index, tokens))
        return ", ".join([f"{os.path.getsize(prefix + '.bin')} bytes", *(f"{sum_:08x}" for sum_ in sums)])


def _find(cfg: PretrainConfig) -> Path | None:
    resume, own = cfg.checkpoint.resume, checkpoints_in(own_checkpoints(cfg.run_dir))
    if resume == "auto":
        return own[-1] if own else None
    is_again = bool(own) and resume != "never" and _resumed_from(own) in (resume, None)  # the same command
    if is_again and Path(resume).resolve() not in [path.resolve() for path in own]:
        return own[-1]
    found = None if resume == "never" else find_checkpoint(resume, "checkpoint.resume")
    if all(doubt(path) for path in reversed(_gone_back_over(cfg, found))):
        return found  # no whole checkpoint is lost by it
    if is_again:
        return own[-1]
    problem = f"{cfg.run_dir} holds checkpoints up to {own[-1].name}, which this run would mix its own with"
    raise ConfigError(
        "checkpoint.resume", resume, problem, "Set checkpoint.resume=auto to go on from there, or another run_dir"
    )


def _resumed_from(own: list[Path]) -> str | None:
    """The `checkpoint.resume` of the run that wrote these, by the last that can be read; None if none can be."""
    for checkpoint in reversed(own):
        with suppress(ConfigError):
            return read_config(checkpoint).checkpoint.resume
    return None


def _gone_back_over(cfg: PretrainConfig, start: Path | None) -> list[Path]:
    """The run folder's checkpoints that a run from `start` would write its own among."""
    own = checkpoints_in(own_checkpoints(cfg.run_dir))
    if start is None or not is_own(start, cfg.run_dir):
        return own
    return [path for path in own if step_of(path) > step_of(start)]


def _check_same_architecture(
    changes: list[Change], checkpoint: Path, *, weights_only: bool = False, is_new_phase: bool = False
) -> None:
    may_differ = _NOT_IN_SHARDS | (_OF_A_PHASE if is_new_phase else set())
    parts = ("model",) if weights_only else _ARCHITECTURE
    for change in changes:
        name = change.setting
        if name.partition(".")[0] in parts and name not in may_differ:
            problem = f"{checkpoint} was trained with {name}={change.before}"
            phase = ", or checkpoint.new_data=true for a new phase" if name in _OF_A_PHASE else ""
            raise ConfigError(name, change.now, problem, f"Set it so, or start in another run_dir{phase}")
        if name == "parallel.distributed_optimizer" and not weights_only:
            problem = f"{checkpoint} holds the optimizer's state of the other kind"
            raise ConfigError(name, change.now, problem, f"Set {name}={str(change.before).lower()}")


def _check_same_order(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    before = _under_todays_paths(before, now)
    for setting, value in now.items():
        if (saved := before.get(setting)) == value:
            continue
        elsewhere = (
            "train in another run_dir: from the start, or as a new phase on these data with"
            f" checkpoint.resume={checkpoint} and checkpoint.new_data=true"
        )
        if setting == _CONTENTS:
            problem = f"{checkpoint} was trained on other contents of these files"
            raise ConfigError(_PATH, _written(_PATH, now[_PATH]), problem, f"Restore them, or {elsewhere}")
        problem = (
            f"{checkpoint} was trained with {_written(setting, saved)}, another order of the data:"
            " samples would come twice or not at all"
        )
        remedy = f"Set it so, or {elsewhere}"
        if setting == _NUM_SAMPLES:
            remedy = f"Leave it out: after the epochs of these {saved} others follow, as many as train.steps take"
        raise ConfigError(setting, _written(setting, value), problem, remedy)


def _written(setting: str, value: Any) -> Any:
    """As a command line has it."""
    if setting != _PATH or not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0][1]
    return f"[{','.join(f'{weight:g},{prefix}' for weight, prefix in value)}]"


def _under_todays_paths(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A saved order as it would be told today, if its datasets are today's.

    Megatron draws samples by seeds, weights and numbers of samples; paths only name files of its cache.
    """
    saved, found = before.get(_CONTENTS, []), now[_CONTENTS]
    # Until the tokens had a sum too, contents were told by size and index alone: enough under one path.
    without_tokens = [told.rpartition(", ")[0] for told in found]
    if before.get(_PATH) == now[_PATH] and saved == without_tokens:
        return before | {_CONTENTS: found}
    if saved == found and [weight for weight, _ in before.get(_PATH, [])] == [weight for weight, _ in now[_PATH]]:
        return before | {_PATH: now[_PATH]}
    return before


def claim_run_dir(cfg: PretrainConfig, start: Start) -> FolderLock:
    """Make the run folder and hold it against other jobs until this process ends; rank 0's work.

    What lies there that is no whole checkpoint is put out of the way: saves that were killed are removed, checkpoints
    newer than the start that are damaged or could not be loaded are renamed to `damaged_iter_*`, in a line each.

    Raises:
        ConfigError: it can't be written, or another job holds it.
    """
    run_dir = Path(cfg.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run_dir / ".lock")
    except BlockingIOError as error:
        raise ConfigError("run_dir", run_dir, "another job is at work there", "Wait for it, or name another") from error
    except OSError as error:
        raise ConfigError("run_dir", run_dir, f"can't be written ({error})", "Name another folder") from error
    for partial in own_checkpoints(cfg.run_dir).glob(".iter_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)  # its writers may still be at work
    for newer in _gone_back_over(cfg, start.checkpoint):
        if problem := doubt(newer):
            kept = newer.rename(set_aside_name(newer))
            print(f"{newer}: {problem}; kept as {kept.name}", flush=True)
    return lock


def set_aside_name(checkpoint: Path) -> Path:
    """The first free name of `damaged_iter_0000010`, `damaged_iter_0000010.1`, …."""
    name = f"damaged_{checkpoint.name}"
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    return next(path for path in map(checkpoint.with_name, names) if not path.exists())
