"""Finds a run's starting checkpoint, and checks that they fit."""

import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from s2train.attention.registry import kinds_of
from s2train.checkpoints.folders import (
    Progress,
    checkpoints_in,
    find_checkpoint,
    is_own,
    own_checkpoints,
    read_config,
    read_progress,
    remedy_for_damage,
    step_of,
)
from s2train.checkpoints.integrity import damage, known_problem
from s2train.checkpoints.kind_weights import InitialWeights, initial_weights
from s2train.checkpoints.masks import check_masks, mask_digests
from s2train.checkpoints.setting_changes import ALLOW_CHANGES, Change, allowed_changes, changes_between, check_allowed
from s2train.config import PretrainConfig
from s2train.data.blend import parse_blend
from s2train.data.checks import num_train_samples
from s2train.data.contents import are_same, contents_of
from s2train.data.parts import training_part
from s2train.data.splits import megatron_split
from s2train.data.tokenizers import fingerprint
from s2train.errors import ConfigError, as_typed
from s2train.files import FolderLock
from s2train.planning import hybrid_layout
from s2train.rope_scaling import RopeScalingConfig
from s2train.validation.token_budgets import length, step_tokens, token_budgets

# Sections that determine the shards: a run must have the same values as the checkpoint that it loads.
_ARCHITECTURE = ("model", "layout", "schedule")
_NOT_IN_SHARDS = {"model.name", "model.init_std"}
# For longer sequences: a higher base (arXiv 2309.16039, section 2.1), or scaled frequencies. No shard depends on them.
_SCALING = {f"model.rope_scaling.{one.name}" for one in fields(RopeScalingConfig)}
_PHASE_MAY_CHANGE = {"model.rotary_base", *_SCALING}
_WITHOUT_WEIGHTS = ("layout", "schedule")  # sections that a new phase may change where it is allowed
_NUM_SAMPLES = "data.num_samples"
_PATH = "data.path"
_TAKE_WEIGHTS = "take the weights alone with checkpoint.weights_only=true"
_CONTENTS = "the datasets' contents"  # a key of saved orders, beside settings


@dataclass(frozen=True)
class Start:
    """Starting point of a run.

    Attributes:
        checkpoint: checkpoint to load; None for a new run.
        progress: progress that the run would save now.
        rng_ranks: `rng_ranks` of the checkpoint's progress.
        changes: settings that differ from the checkpoint's; from weights alone, those of RoPE; empty for a new run.
        initial: weights of kinds of attention that the checkpoint lacks.
    """

    checkpoint: Path | None
    progress: Progress
    rng_ranks: list[int] | None = None
    changes: list[Change] = field(default_factory=list)
    initial: InitialWeights = field(default_factory=InitialWeights)


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
    start = _find_start(cfg, masks, tokenizer)
    return replace(start, progress=replace(start.progress, masks=masks, tokenizer=tokenizer))


def _find_start(cfg: PretrainConfig, masks: dict[str, str], tokenizer: str | None) -> Start:
    """Find it; masks and tokenizer are those of the run."""
    checkpoint = _find(cfg)
    if checkpoint is None:
        if cfg.checkpoint.new_data:
            lacking = f"checkpoint.resume={cfg.checkpoint.resume} finds no run to continue in {cfg.run_dir}"
            raise ConfigError(
                "checkpoint.new_data", True, lacking, "Set checkpoint.resume=RUN_DIR too, or leave it out"
            )
        return Start(None, _step_0(cfg))
    if problem := damage(checkpoint):
        raise ConfigError("checkpoint.resume", checkpoint, problem, remedy_for_damage(checkpoint, "checkpoint.resume"))
    saved, is_in_run_dir = read_progress(checkpoint, "checkpoint.resume"), is_own(checkpoint, cfg.run_dir)
    is_new_phase = cfg.checkpoint.new_data and not is_in_run_dir
    trained = read_config(checkpoint, "checkpoint.resume")
    if is_in_run_dir:
        _check_own_start(cfg, trained, saved, checkpoint)
    changes = changes_between(trained, cfg)
    weights_only = loads_weights_alone(cfg, checkpoint)
    allowed = allowed_changes(cfg) if is_new_phase else None
    may_change = _may_change(cfg)
    if weights_only:
        may_change |= set(
            _PHASE_MAY_CHANGE if cfg.checkpoint.weights_only else filter(allowed_changes(cfg), _PHASE_MAY_CHANGE)
        )
    check_same_architecture(
        changes,
        checkpoint,
        may_change=may_change,
        weights_only=weights_only,
        allowed=allowed,
        is_in_run_dir=is_in_run_dir,
    )
    if not weights_only and not any(change.setting.partition(".")[0] in _WITHOUT_WEIGHTS for change in changes):
        check_masks(saved.masks, masks, checkpoint, "checkpoint.resume")
    is_other = None not in (saved.tokenizer, tokenizer) and saved.tokenizer != tokenizer
    if is_other and not allowed_changes(cfg)("data.tokenizer"):
        raise _other_tokenizer(cfg, trained, checkpoint)
    initial = initial_weights(trained, cfg, checkpoint, weights_only)
    if weights_only:
        rotation = [change for change in changes if change.setting in _PHASE_MAY_CHANGE]
        return Start(checkpoint, _step_0(cfg), changes=rotation, initial=initial)
    _check_frozen_trunk(cfg, trained, saved, checkpoint)
    _check_muon(cfg, changes, checkpoint)
    _check_precision(cfg, changes, checkpoint)
    _check_step_size(cfg, saved, checkpoint)
    last = cfg.train.last_step
    if not is_in_run_dir and saved.step >= last:
        end = length(cfg, "train.steps")
        problem = f"{checkpoint} is already at step {saved.step}, so there is nothing to train"
        if cfg.train.steps > saved.step:
            remedy = f"Set train.exit_step to more than {saved.step}, or null"
            raise ConfigError("train.exit_step", cfg.train.exit_step, problem, remedy)
        remedy = f"Set more than {end.of(saved.step)} (and train.exit_step, if set)"
        raise ConfigError(end.setting, last if end.unit == 1 else end.value, problem, remedy)
    if is_new_phase:
        order = data_order(cfg, saved.step)
        progress = Progress(saved.step, 0, order, None, first_step=saved.step, decays_gains=saved.decays_gains)
        return Start(checkpoint, progress, saved.rng_ranks, changes)
    order = data_order(cfg, saved.first_step)
    if cfg.data.num_samples is None:  # keep the order even if the run's length changed
        order[_NUM_SAMPLES] = saved.order.get(_NUM_SAMPLES)
    if (trained.data.valid_path is None) != (cfg.data.valid_path is None):
        _check_same_part(trained, cfg, checkpoint)
    check_same_order(saved.order, order, checkpoint)
    if is_in_run_dir:  # a branch in another run folder is a separate experiment
        check_allowed(cfg, checkpoint, [change for change in changes if change.setting not in order])
    # A branch of another run is a separate run in wandb.
    progress = replace(saved, order=order, wandb_id=saved.wandb_id if is_in_run_dir else None)
    return Start(checkpoint, progress, saved.rng_ranks, changes)


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


def _other_tokenizer(cfg: PretrainConfig, trained: PretrainConfig, checkpoint: Path) -> ConfigError:
    """Make the error for a tokenizer of other ids."""
    before, now = trained.data.tokenizer, cfg.data.tokenizer
    problem = f"{checkpoint} was trained with {before}"
    if before == now:
        problem = f"{checkpoint} was trained with another content of this file"
    remedy = (
        "Take that tokenizer, and data that it made (launch/prepare_data.py tokenizer=FILE); or, to train its"
        f" embeddings again, set {ALLOW_CHANGES}=[data.tokenizer]"
    )
    return ConfigError("data.tokenizer", now, problem, remedy)


def _check_own_start(cfg: PretrainConfig, before: PretrainConfig, saved: Progress, checkpoint: Path) -> None:
    """Reject settings of another start than the run had.

    A run that began so is resumed by the same command.
    """
    for name in ("new_data", "weights_only"):
        if getattr(cfg.checkpoint, name) and not getattr(before.checkpoint, name) and not saved.weights_only:
            problem = f"would have no effect: the run would resume from its own {checkpoint}"
            remedy = f"Set another run_dir and checkpoint.resume={cfg.run_dir}, or checkpoint.{name}=false"
            raise ConfigError(f"checkpoint.{name}", True, problem, remedy)


def _check_muon(cfg: PretrainConfig, changes: list[Change], checkpoint: Path) -> None:
    """Reject changed options of Muon.

    Its loaded state keeps the options that it was saved with.
    """
    for change in changes:
        if cfg.optim.name == "muon" and change.setting.startswith("optim.options."):
            problem = (
                f"{checkpoint} was trained with {change.setting}={as_typed(change.before)}, which Muon's state keeps"
            )
            remedy = "Set that value, or start from the weights alone in another run_dir (checkpoint.weights_only=true)"
            raise ConfigError(change.setting, change.now, problem, remedy)


def _check_precision(cfg: PretrainConfig, changes: list[Change], checkpoint: Path) -> None:
    """Reject another precision if the optimizer isn't distributed.

    With bf16 its state has fp32 copies of the weights, and with fp32 it has none.
    """
    before = next((change.before for change in changes if change.setting == "train.precision"), None)
    if before is not None and not cfg.parallel.distributed_optimizer:
        problem = f"{checkpoint} holds optimizer state saved with train.precision={before}"
        remedy = (
            f"Set train.precision={before}, which only parallel.distributed_optimizer=true can change, or start from"
            " the weights alone in another run_dir (checkpoint.weights_only=true)"
        )
        raise ConfigError("train.precision", cfg.train.precision, problem, remedy)


def _check_step_size(cfg: PretrainConfig, saved: Progress, checkpoint: Path) -> None:
    """Reject a length in tokens if earlier steps had another size."""
    budgets, size = token_budgets(cfg), step_tokens(cfg)
    consumed = saved.consumed_samples * cfg.train.seq_length
    if not budgets or (consumed == saved.step * size and saved.first_step == 0):
        return
    given = budgets[0]
    before = f" before step {saved.first_step}, and others" if saved.first_step else ""
    problem = f"{checkpoint} is at step {saved.step} after {consumed:,} tokens{before}: steps here have {size:,}"
    remedy = f"Set {given.setting}=null and steps instead"
    if given.setting == "train.tokens" and given.value is not None and not before:
        left = -(-max(0, given.value - consumed) // size)
        remedy = f"Set train.tokens=null train.steps={saved.step + left}, and other lengths in steps too"
    raise ConfigError(given.setting, given.value, problem, remedy)


def _check_frozen_trunk(cfg: PretrainConfig, before: PretrainConfig, saved: Progress, checkpoint: Path) -> None:
    """Reject freezing a trunk that has been trained.

    Its optimizer state would move it.
    """
    frozen, taken = cfg.train.freeze_trunk_steps, saved.step - saved.health.get("skipped", 0)
    if frozen > taken > before.train.freeze_trunk_steps:
        problem = f"{checkpoint} is at step {saved.step}, and the optimizer state of its trunk would keep moving it"
        remedy = f"Set at most {taken}, or start from its weights with checkpoint.weights_only=true"
        raise ConfigError("train.freeze_trunk_steps", frozen, problem, remedy)


def _step_0(cfg: PretrainConfig) -> Progress:
    return Progress(0, 0, data_order(cfg), None, decays_gains=False)


def data_order(cfg: PretrainConfig, first_step: int = 0) -> dict[str, Any]:
    """What determines the order of the training samples from `first_step` on.

    Maps settings to values, and `_CONTENTS` to the datasets' contents.
    """
    blend = parse_blend(cfg.data.path)
    return {
        _PATH: [[weight, prefix] for weight, prefix in zip(blend.weights, blend.prefixes, strict=True)],
        _CONTENTS: [contents_of(prefix) for prefix in blend.prefixes],
        "data.split": megatron_split(training_part(cfg.data).split),
        _NUM_SAMPLES: num_train_samples(cfg, first_step),
        "train.seq_length": cfg.train.seq_length,
        "seed": cfg.seed,
    }


def _find(cfg: PretrainConfig) -> Path | None:
    resume, own = cfg.checkpoint.resume, checkpoints_in(own_checkpoints(cfg.run_dir))
    if resume == "auto":
        return own[-1] if own else None
    # The same command was started before.
    is_repeated = bool(own) and resume != "never" and _resumed_from(own) in (resume, None)
    if is_repeated and Path(resume).resolve() not in [path.resolve() for path in own]:
        return own[-1]
    found = None if resume == "never" else find_checkpoint(resume, "checkpoint.resume")
    if all(known_problem(path) for path in reversed(_later_checkpoints(cfg, found))):
        return found  # no intact checkpoint is lost
    if is_repeated:
        return own[-1]
    problem = f"{cfg.run_dir} holds checkpoints up to {own[-1].name}, and this run would add its own among them"
    raise ConfigError(
        "checkpoint.resume", resume, problem, "Set checkpoint.resume=auto to resume from the last, or another run_dir"
    )


def _resumed_from(own: list[Path]) -> str | None:
    """`checkpoint.resume` of the run that wrote these checkpoints.

    Reads the last readable checkpoint; None if none is readable.
    """
    for checkpoint in reversed(own):
        with suppress(ConfigError):
            return read_config(checkpoint).checkpoint.resume
    return None


def _later_checkpoints(cfg: PretrainConfig, start: Path | None) -> list[Path]:
    """Checkpoints of the run folder after `start`.

    A run from `start` would write its own among them.
    """
    own = checkpoints_in(own_checkpoints(cfg.run_dir))
    if start is None or not is_own(start, cfg.run_dir):
        return own
    return [path for path in own if step_of(path) > step_of(start)]


def _may_change(cfg: PretrainConfig) -> set[str]:
    """Return the settings of kinds of attention that may change on resume."""
    kinds = kinds_of(cfg.layout)
    return {f"layout.kinds.{letter}.{name}" for letter in cfg.layout.kinds for name in kinds[letter].may_change}


def _is_without_weights(name: str) -> bool:
    """Return whether no weight depends on this setting of the layout.

    Kinds of attention may have weights.
    """
    return name.partition(".")[0] in _WITHOUT_WEIGHTS and not name.startswith("layout.kinds.")


def _other_layout(changed: Iterable[str]) -> str:
    """Format the remedy that allows all changes of a new phase's layout.

    Empty if one of them can't be allowed.
    """
    names = [name for name in changed if name.partition(".")[0] in _WITHOUT_WEIGHTS]
    if not all(map(_is_without_weights, names)):
        return ""
    return f", or '{ALLOW_CHANGES}=[{','.join(names)}]' for attention of another layout in this phase"


def check_same_architecture(
    changes: list[Change],
    checkpoint: Path,
    *,
    may_change: Collection[str] = (),
    weights_only: bool = False,
    allowed: Callable[[str], bool] | None = None,
    is_in_run_dir: bool = True,
) -> None:
    """Check that no change alters the checkpoint's architecture.

    Args:
        may_change: settings that may differ: of kinds of attention that their weights do not depend on, or of RoPE.
        allowed: in a new phase, whether `checkpoint.allow_changes` names a setting. A setting of the layout that it
            names may differ, since dense and S2 attention have no weights. None: no new phase.
        is_in_run_dir: whether the checkpoint is of the run's own folder, for the remedy.
    Raises:
        ConfigError: a setting of the architecture or the optimizer's sharding differs.
    """
    may_differ = _NOT_IN_SHARDS | set(may_change) | (set() if allowed is None else _PHASE_MAY_CHANGE)
    parts = ("model",) if weights_only else _ARCHITECTURE
    for change in changes:
        name = change.setting
        section = name.partition(".")[0]
        if allowed is not None and _is_without_weights(name) and allowed(name):
            continue
        if section in parts and name not in may_differ:
            problem = f"{checkpoint} was trained with {name}={as_typed(change.before)}"
            phase = ""
            if name in _PHASE_MAY_CHANGE:
                phase = ", or checkpoint.new_data=true for a new phase, or checkpoint.weights_only=true"
            if name in _PHASE_MAY_CHANGE and weights_only:
                names = ",".join(one.setting for one in changes if one.setting in _PHASE_MAY_CHANGE)
                phase = f", or '{ALLOW_CHANGES}=[{names}]' to rotate positions otherwise"
            if allowed is not None and section in _WITHOUT_WEIGHTS:
                phase = _other_layout(change.setting for change in changes if change.setting not in may_differ)
            other = "start in another run_dir"
            if not is_in_run_dir:
                is_in_model = weights_only or section == "model"
                other = "start anew with checkpoint.resume=auto" if is_in_model else _TAKE_WEIGHTS
            raise ConfigError(name, change.now, problem, f"Set that value, or {other}{phase}")
        if name in ("parallel.distributed_optimizer", "optim.name") and not weights_only:
            problem = f"{checkpoint} holds optimizer state saved with {name}={as_typed(change.before)}"
            raise ConfigError(name, change.now, problem, f"Set {name}={as_typed(change.before)}")


def _check_same_part(trained: PretrainConfig, cfg: PretrainConfig, checkpoint: Path) -> None:
    """Check that a run trains on the documents of its checkpoint.

    With `data.valid_path` these are all of `data.path`, else the first part of `data.split`.
    """
    before, now = (megatron_split(training_part(each.data).split) for each in (trained, cfg))
    if before == now:
        return
    given = as_typed(trained.data.valid_path)
    problem = f"{checkpoint} was trained with data.valid_path={given}, on other documents of data.path"
    remedy = "Set that value, or train in another run_dir"
    raise ConfigError("data.valid_path", cfg.data.valid_path, problem, remedy)


def check_same_order(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Check that a run continues the data order of its checkpoint.

    Args:
        before, now: `data_order` of the checkpoint and of the run.
    Raises:
        ConfigError: they differ in more than paths.
    """
    before = _with_current_paths(before, now)
    for setting, value in now.items():
        if (saved := before.get(setting)) == value:
            continue
        elsewhere = (
            "train in another run_dir: from step 1, or as a new phase on these data with"
            f" checkpoint.resume={checkpoint} and checkpoint.new_data=true"
        )
        if setting == _CONTENTS:
            problem = f"{checkpoint} was trained on other contents of these files"
            raise ConfigError(_PATH, _given(_PATH, now[_PATH]), problem, f"Restore them, or {elsewhere}")
        problem = (
            f"{checkpoint} was trained with {as_typed(_given(setting, saved))}, which gives another order of the data:"
            " samples would be repeated or left out"
        )
        remedy = f"Set that value, or {elsewhere}"
        if setting == _NUM_SAMPLES:
            remedy = (
                f"Leave it unset: after the epochs of these {saved} samples, the epochs that train.steps need follow"
            )
        raise ConfigError(setting, _given(setting, value), problem, remedy)


def _given(setting: str, value: Any) -> Any:
    """Return a value of a saved order as its setting has it."""
    if setting != _PATH or not isinstance(value, list):
        return value
    if len(value) == 1:
        return value[0][1]
    return [part for weight, prefix in value for part in (f"{weight:g}", prefix)]


def _with_current_paths(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Update the paths of a saved order if its datasets are unchanged.

    Megatron draws samples by seeds, weights and numbers of samples; paths only name its cache files.
    """
    at_same_paths = before.get(_PATH) == now[_PATH]
    has_same_weights = [weight for weight, _ in before.get(_PATH, [])] == [weight for weight, _ in now[_PATH]]
    if has_same_weights and are_same(before.get(_CONTENTS, []), now[_CONTENTS], at_same_paths=at_same_paths):
        return before | {_PATH: now[_PATH], _CONTENTS: now[_CONTENTS]}
    return before


def claim_run_dir(cfg: PretrainConfig, start: Start) -> FolderLock:
    """Create the run folder, and lock it against other jobs.

    The lock lasts until this process ends. Call it on rank 0. Removes incomplete saves. Renames checkpoints newer than
    the start that are damaged or could not be loaded to `damaged_iter_*`, and prints a line for each.

    Raises:
        ConfigError: the folder can't be written, or another job holds it.
    """
    run_dir = Path(cfg.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(run_dir / ".lock")
    except BlockingIOError as error:
        remedy = "Wait until it ends, or set another folder"
        raise ConfigError("run_dir", run_dir, "another job is running there", remedy) from error
    except OSError as error:
        raise ConfigError("run_dir", run_dir, f"can't be written ({error})", "Set another folder") from error
    for partial in own_checkpoints(cfg.run_dir).glob(".iter_*.partial"):
        shutil.rmtree(partial, ignore_errors=True)  # its writers may still be running
    for newer in _later_checkpoints(cfg, start.checkpoint):
        if problem := known_problem(newer):
            kept = newer.rename(free_damaged_name(newer))
            print(f"{newer}: {problem}; kept as {kept.name}", flush=True)
    return lock


def free_damaged_name(checkpoint: Path) -> Path:
    """First free name of `damaged_iter_0000010`, `damaged_iter_0000010.1`, …."""
    name = f"damaged_{checkpoint.name}"
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    return next(path for path in map(checkpoint.with_name, names) if not path.exists())
