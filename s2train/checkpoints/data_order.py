"""Compares a run's order of training samples with its checkpoint's."""

from pathlib import Path
from typing import Any

from s2train.checkpoints.saved_run import SavedRun
from s2train.command_line.commands import shell_setting
from s2train.config import PretrainConfig
from s2train.data.blend import parse_blend
from s2train.data.checks import num_train_samples
from s2train.data.contents import are_same, contents_at, contents_of
from s2train.data.parts import training_part
from s2train.data.splits import megatron_split
from s2train.errors import ConfigError, as_typed

_NUM_SAMPLES = "data.num_samples"
_PATH = "data.path"
_CONTENTS = "the datasets' contents"  # a key of saved orders, beside settings


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


def has_contents(order: dict[str, Any], cfg: PretrainConfig, *, at_same_paths: bool) -> bool | None:
    """Whether datasets have a saved order's contents.

    None if one is not there. If the order has none recorded, its datasets are those at the same paths.
    """
    if _CONTENTS not in order:
        return at_same_paths
    found = contents_at(cfg.data.path)
    return None if found is None else are_same(order[_CONTENTS], found, at_same_paths=at_same_paths)


def continued_order(cfg: PretrainConfig, saved: SavedRun) -> dict[str, Any]:
    """Return `data_order` of a run that continues another's.

    Raises:
        ConfigError: the run would train on other samples.
    """
    order = data_order(cfg, saved.progress.first_step)
    if cfg.data.num_samples is None:  # keep the order even if the run's length changed
        order[_NUM_SAMPLES] = saved.progress.order.get(_NUM_SAMPLES)
    if (saved.config.data.valid_path is None) != (cfg.data.valid_path is None):
        _check_same_part(cfg, saved)
    check_same_order(saved.progress.order, order, saved.checkpoint)
    return order


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
            f" {shell_setting('checkpoint.resume', checkpoint)} and checkpoint.new_data=true"
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


def _check_same_part(cfg: PretrainConfig, saved: SavedRun) -> None:
    """Check that a run trains on the documents of its checkpoint.

    With `data.valid_path` these are all of `data.path`, else the first part of `data.split`.
    """
    before, now = (megatron_split(training_part(each.data).split) for each in (saved.config, cfg))
    if before == now:
        return
    given = as_typed(saved.config.data.valid_path)
    problem = f"{saved.checkpoint} was trained with data.valid_path={given}, on other documents of data.path"
    remedy = "Set that value, or train in another run_dir"
    raise ConfigError("data.valid_path", cfg.data.valid_path, problem, remedy)
