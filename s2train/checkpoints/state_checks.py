"""Checks that a run can continue with a checkpoint's training state."""

from s2train.checkpoints.saved_run import SavedRun
from s2train.checkpoints.setting_changes import Change
from s2train.command_line.commands import shell_setting
from s2train.config import PretrainConfig
from s2train.errors import ConfigError, as_typed
from s2train.validation.token_budgets import length, step_tokens, token_budgets


def check_own_start(cfg: PretrainConfig, saved: SavedRun) -> None:
    """Reject settings of another start than the run had.

    A run that began so is resumed by the same command.
    """
    if saved.progress.weights_only:
        return
    for name in ("new_data", "weights_only"):
        if getattr(cfg.checkpoint, name) and not getattr(saved.config.checkpoint, name):
            problem = f"would have no effect: the run would resume from its own {saved.checkpoint}"
            resume = shell_setting("checkpoint.resume", cfg.run_dir)
            remedy = f"Set another run_dir and {resume}, or checkpoint.{name}=false"
            raise ConfigError(f"checkpoint.{name}", True, problem, remedy)


def check_state(cfg: PretrainConfig, saved: SavedRun, changes: list[Change]) -> None:
    """Check that the run can continue with optimizer state and schedule.

    Raises:
        ConfigError: a setting contradicts them, or no step is left in another run's folder.
    """
    _check_frozen_trunk(cfg, saved)
    _check_muon(cfg, saved, changes)
    _check_precision(cfg, saved, changes)
    _check_step_size(cfg, saved)
    if not saved.is_own:
        _check_step_left(cfg, saved)


def _check_step_left(cfg: PretrainConfig, saved: SavedRun) -> None:
    """Reject a checkpoint at or after the run's last step."""
    step, last = saved.progress.step, cfg.train.last_step
    if step < last:
        return
    end = length(cfg, "train.steps")
    problem = f"{saved.checkpoint} is already at step {step}, so there is nothing to train"
    if cfg.train.steps > step:
        remedy = f"Set train.exit_step to more than {step}, or null"
        raise ConfigError("train.exit_step", cfg.train.exit_step, problem, remedy)
    remedy = f"Set more than {end.of(step)} (and train.exit_step, if set)"
    raise ConfigError(end.setting, last if end.unit == 1 else end.value, problem, remedy)


def _check_muon(cfg: PretrainConfig, saved: SavedRun, changes: list[Change]) -> None:
    """Reject changed options of Muon.

    Its loaded state keeps the options that it was saved with.
    """
    for change in changes:
        if cfg.optim.name == "muon" and change.setting.startswith("optim.options."):
            before = f"{change.setting}={as_typed(change.before)}"
            problem = f"{saved.checkpoint} was trained with {before}, which Muon's state keeps"
            remedy = "Set that value, or start from the weights alone in another run_dir (checkpoint.weights_only=true)"
            raise ConfigError(change.setting, change.now, problem, remedy)


def _check_precision(cfg: PretrainConfig, saved: SavedRun, changes: list[Change]) -> None:
    """Reject another precision if the optimizer isn't distributed.

    With bf16 its state has fp32 copies of the weights, and with fp32 it has none.
    """
    before = next((change.before for change in changes if change.setting == "train.precision"), None)
    if before is not None and not cfg.parallel.distributed_optimizer:
        problem = f"{saved.checkpoint} holds optimizer state saved with train.precision={before}"
        remedy = (
            f"Set train.precision={before}, which only parallel.distributed_optimizer=true can change, or start from"
            " the weights alone in another run_dir (checkpoint.weights_only=true)"
        )
        raise ConfigError("train.precision", cfg.train.precision, problem, remedy)


def _check_step_size(cfg: PretrainConfig, saved: SavedRun) -> None:
    """Reject a length in tokens if earlier steps had another size."""
    budgets, size, progress, step = token_budgets(cfg), step_tokens(cfg), saved.progress, saved.progress.step
    consumed = progress.consumed_samples * cfg.train.seq_length
    if not budgets or (consumed == step * size and progress.first_step == 0):
        return
    given = budgets[0]
    before = f" before step {progress.first_step}, and others" if progress.first_step else ""
    problem = f"{saved.checkpoint} is at step {step} after {consumed:,} tokens{before}: steps here have {size:,}"
    remedy = f"Set {given.setting}=null and steps instead"
    if given.setting == "train.tokens" and given.value is not None and not before:
        left = -(-max(0, given.value - consumed) // size)
        remedy = f"Set train.tokens=null train.steps={step + left}, and other lengths in steps too"
    raise ConfigError(given.setting, given.value, problem, remedy)


def _check_frozen_trunk(cfg: PretrainConfig, saved: SavedRun) -> None:
    """Reject freezing a trunk that has been trained.

    Its optimizer state would move it.
    """
    step = saved.progress.step
    frozen, taken = cfg.train.freeze_trunk_steps, step - saved.progress.health.get("skipped", 0)
    if frozen > taken > saved.config.train.freeze_trunk_steps:
        problem = f"{saved.checkpoint} is at step {step}, and the optimizer state of its trunk would keep moving it"
        remedy = f"Set at most {taken}, or start from its weights with checkpoint.weights_only=true"
        raise ConfigError("train.freeze_trunk_steps", frozen, problem, remedy)
