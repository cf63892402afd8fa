"""Finds a run's starting checkpoint, and checks that they fit."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from s2train.checkpoints.architecture import (
    changes_of_rope,
    check_same_architecture,
    is_same_layout,
    settings_that_may_change,
)
from s2train.checkpoints.data_order import continued_order, data_order
from s2train.checkpoints.folders import Progress, read_progress
from s2train.checkpoints.held_out import HeldOutChange, held_out_change, held_out_contents
from s2train.checkpoints.kind_weights import InitialWeights, initial_weights
from s2train.checkpoints.listing import is_own
from s2train.checkpoints.masks import check_masks, mask_digests
from s2train.checkpoints.run_folder import choose_checkpoint
from s2train.checkpoints.saved_run import SavedRun
from s2train.checkpoints.setting_changes import ALLOW_CHANGES, Change, allowed_changes, changes_between, check_allowed
from s2train.checkpoints.state_checks import check_own_start, check_state
from s2train.config import PretrainConfig
from s2train.data.tokenizers import fingerprint
from s2train.errors import ConfigError
from s2train.planning import hybrid_layout


@dataclass(frozen=True)
class Start:
    """Starting point of a run.

    Attributes:
        checkpoint: checkpoint to load; None for a new run.
        progress: progress that the run would save now.
        rng_ranks: `rng_ranks` of the checkpoint's progress.
        changes: settings that differ from the checkpoint's; from weights alone, those of RoPE; empty for a new run.
        initial: weights of kinds of attention that the checkpoint lacks.
        held_out: how held-out data differ from the checkpoint's, if the run continues its order of the data.
    """

    checkpoint: Path | None
    progress: Progress
    rng_ranks: list[int] | None = None
    changes: list[Change] = field(default_factory=list)
    initial: InitialWeights = field(default_factory=InitialWeights)
    held_out: HeldOutChange | None = None


def find_start(cfg: PretrainConfig) -> Start:
    """Find where this run starts; only reads files.

    Raises:
        ConfigError: `checkpoint.resume` names no checkpoint, or an earlier one of the run's own folder; the checkpoint
            is damaged, has another architecture or other masks, or lacks weights; a new phase has none to continue; the
            data or their order differ; the tokenizer or settings of the experiment in the run folder differ, and
            `checkpoint.allow_changes` does not name them; a run of this folder did not begin as the settings say; or no
            step is left.
    """
    masks, tokenizer = mask_digests(hybrid_layout(cfg)), fingerprint(cfg.data.tokenizer)
    held_out = held_out_contents(cfg)
    start = _find_start(cfg, masks, tokenizer, held_out)
    return replace(start, progress=replace(start.progress, masks=masks, tokenizer=tokenizer, held_out=held_out))


def _find_start(cfg: PretrainConfig, masks: dict[str, str], tokenizer: str | None, held_out: list[str] | None) -> Start:
    """Find it; masks, tokenizer and held-out data are those of the run."""
    checkpoint = choose_checkpoint(cfg)
    if checkpoint is None:
        return _new_run(cfg)
    saved = SavedRun.read(checkpoint, cfg.run_dir)
    if saved.is_own:
        check_own_start(cfg, saved)
    changes, weights_only = changes_between(saved.config, cfg), loads_weights_alone(cfg, checkpoint)
    is_new_phase = cfg.checkpoint.new_data and not saved.is_own
    check_same_architecture(
        changes,
        checkpoint,
        may_change=settings_that_may_change(cfg, weights_only=weights_only),
        weights_only=weights_only,
        allowed=allowed_changes(cfg) if is_new_phase else None,
        is_in_run_dir=saved.is_own,
    )
    if not weights_only and is_same_layout(changes):
        check_masks(saved.progress.masks, masks, checkpoint, "checkpoint.resume")
    _check_tokenizer(cfg, saved, tokenizer)
    initial = initial_weights(saved.config, cfg, checkpoint, weights_only)
    if weights_only:
        return Start(checkpoint, _step_0(cfg), changes=changes_of_rope(changes), initial=initial)
    check_state(cfg, saved, changes)
    rng_ranks = saved.progress.rng_ranks
    if is_new_phase:
        return Start(checkpoint, _new_phase(cfg, saved.progress), rng_ranks, changes)
    continued = _continued(cfg, saved, changes)
    return Start(checkpoint, continued, rng_ranks, changes, held_out=held_out_change(cfg, saved, held_out))


def _new_run(cfg: PretrainConfig) -> Start:
    if cfg.checkpoint.new_data:
        problem = f"checkpoint.resume={cfg.checkpoint.resume} finds no run to continue in {cfg.run_dir}"
        raise ConfigError("checkpoint.new_data", True, problem, "Set checkpoint.resume=RUN_DIR too, or leave it out")
    return Start(None, _step_0(cfg))


def _step_0(cfg: PretrainConfig) -> Progress:
    return Progress(0, 0, data_order(cfg), None, decays_gains=False)


def _new_phase(cfg: PretrainConfig, saved: Progress) -> Progress:
    order = data_order(cfg, saved.step)
    return Progress(saved.step, 0, order, None, first_step=saved.step, decays_gains=saved.decays_gains)


def _continued(cfg: PretrainConfig, saved: SavedRun, changes: list[Change]) -> Progress:
    """Make the progress of a run that continues its checkpoint's data order."""
    order = continued_order(cfg, saved)
    if not saved.is_own:  # a branch is a separate experiment, and a separate run in wandb
        return replace(saved.progress, order=order, wandb_id=None)
    check_allowed(cfg, saved.checkpoint, [change for change in changes if change.setting not in order])
    return replace(saved.progress, order=order)


def describe_start(cfg: PretrainConfig, start: Start) -> str:
    """Say in a line where a run starts."""
    if start.checkpoint is None:
        return f"new run in {cfg.run_dir}"
    if start.progress.step == 0:
        new = f", and {start.initial}" if start.initial.names else ""
        return f"new run in {cfg.run_dir}, with the weights of {start.checkpoint}{new}"
    return f"resuming from {start.checkpoint}"


def loads_weights_alone(cfg: PretrainConfig, checkpoint: Path) -> bool:
    """Return whether the run takes only weights from a checkpoint.

    The run then begins at step 1. Either the checkpoint holds only weights, or it is another run's and
    `checkpoint.weights_only` is set.
    """
    if cfg.checkpoint.weights_only and not is_own(checkpoint, cfg.run_dir):
        return True
    return read_progress(checkpoint, "checkpoint.resume").weights_only


def _check_tokenizer(cfg: PretrainConfig, saved: SavedRun, tokenizer: str | None) -> None:
    """Reject a tokenizer of other ids, unless `checkpoint.allow_changes` names it."""
    if None in (saved.progress.tokenizer, tokenizer) or saved.progress.tokenizer == tokenizer:
        return
    if allowed_changes(cfg)("data.tokenizer"):
        return
    before, now = saved.config.data.tokenizer, cfg.data.tokenizer
    problem = f"{saved.checkpoint} was trained with {before}"
    if before == now:
        problem = f"{saved.checkpoint} was trained with another content of this file"
    remedy = (
        "Take that tokenizer, and data that it made (launch/prepare_data.py tokenizer=FILE); or, to train its"
        f" embeddings again, set {ALLOW_CHANGES}=[data.tokenizer]"
    )
    raise ConfigError("data.tokenizer", now, problem, remedy)
