"""Changed settings of a resumed run are listed, and some need consent."""

from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from s2train.checkpoints.setting_changes import KEEP_THE_EXPERIMENT, Change, changes_between, check_allowed
from s2train.config import PretrainConfig, settings_by_name
from s2train.errors import ConfigError
from tests.test_configs import pretrain

CHECKPOINT = Path("runs/a/checkpoints/iter_0000002")


@cache
def run_of(*overrides: str) -> PretrainConfig:
    """Settings of a run; not to be changed."""
    return pretrain("+model=tiny_hybrid", *overrides)


def changes(*now: str, before: tuple[str, ...] = ()) -> list[Change]:
    return changes_between(run_of(*before), run_of(*now))


def check(*now: str) -> None:
    check_allowed(run_of(*now), CHECKPOINT, changes(*now))


def test_every_setting_that_differs_is_listed_with_both_values() -> None:
    now = ("optim.lr=1e-3", "train.exit_step=7", "data.path=[0.5,a,0.5,b]", "layout.pattern.sinks=1")
    assert set(map(str, changes(*now))) == {
        "optim.lr 0.003 → 0.001",
        "train.exit_step null → 7",
        "data.path bundled → [0.5,a,0.5,b]",
        "layout.pattern.sinks 0 → 1",
    }


def test_the_lowest_learning_rate_is_listed_unless_it_follows_the_learning_rate() -> None:
    assert list(map(str, changes("optim.lr=1e-3"))) == ["optim.lr 0.003 → 0.001"]
    assert list(map(str, changes("optim.min_lr_ratio=0.2"))) == ["optim.min_lr 0.0003 → 0.0006"]
    kept = changes("optim.lr=1e-3", "optim.min_lr=1e-4", before=("optim.min_lr=2e-4",))
    assert list(map(str, kept)) == ["optim.lr 0.003 → 0.001", "optim.min_lr 0.0002 → 0.0001"]


def test_an_explicit_default_is_no_change() -> None:
    assert changes("model.head_dim=32", "layout.pattern.sinks=0", "optim.decay_steps=400", "data.num_workers=2") == []


def test_other_steps_change_the_learning_rate_schedule() -> None:
    assert list(map(str, changes("train.steps=600"))) == ["optim.decay_steps 400 → 600", "train.steps 400 → 600"]
    assert list(map(str, changes("train.steps=600", "optim.decay_steps=400"))) == ["train.steps 400 → 600"]
    constant = "optim.decay_style=constant"
    assert list(map(str, changes("train.steps=600", constant, before=(constant,)))) == ["train.steps 400 → 600"]


@pytest.mark.parametrize(
    "setting",
    [
        "tracking.log_interval=3",
        "tracking.group=mine",
        "data.num_workers=7",
        "data.warn_epochs=7",
        "data.cache=elsewhere",
        "parallel.pp=2",
        "train.micro_batch_size=2",
        "train.timeout_minutes=5",
        "train.exit_step=9",
        "train.recompute=full",
        "evaluation.interval=7",
        "checkpoint.keep=2",
        "attention_backend=torch",
        "run_dir=elsewhere",
        "profile.steps=[1,2]",
    ],
)
def test_what_does_not_change_the_experiment_needs_no_consent(setting: str) -> None:
    assert changes(setting)
    check(setting)


@pytest.mark.parametrize(
    "setting",
    [
        "optim.lr=1e-3",
        "optim.weight_decay=0",
        "optim.clip_grad=0.5",
        "optim.warmup_steps=7",
        "train.global_batch_size=8",
        "train.precision=bf16",
        "train.steps=600",
        "data.attention_within_documents=true",
        "model.init_std=0.01",
        "fp8=hybrid",
    ],
)
def test_what_changes_the_experiment_is_rejected_unless_allowed(setting: str) -> None:
    name = "optim.decay_steps" if setting == "train.steps=600" else setting.partition("=")[0]
    blamed = setting.partition("=")[0]  # the setting that the user set, from which another may follow
    with pytest.raises(ConfigError, match=rf"^{blamed}=.* {name} .* → .*another run_dir") as rejection:
        check(setting)
    assert f"checkpoint.allow_changes=[{name}]" in rejection.value.remedy
    check(setting, "checkpoint.allow_changes=true")
    check(setting, f"checkpoint.allow_changes=[{name}]")
    check(setting, f"checkpoint.allow_changes={name}")


def test_an_option_that_is_gone_may_be_named() -> None:
    check("checkpoint.allow_changes=[optim.options.sgd_momentum]")


def test_one_error_names_all_changes_not_allowed_and_the_list_to_set() -> None:
    with pytest.raises(ConfigError) as rejection:
        check("optim.lr=1e-3", "optim.beta2=0.99", "optim.eps=1e-6", "checkpoint.allow_changes=[optim.lr]")
    assert "optim.lr " not in rejection.value.problem
    assert "optim.beta2 0.95 → 0.99, optim.eps 1e-08 → 1e-06" in rejection.value.problem
    assert "'checkpoint.allow_changes=[optim.lr,optim.beta2,optim.eps]'" in rejection.value.remedy


def test_the_error_for_more_steps_says_how_to_keep_the_learning_rate() -> None:
    with pytest.raises(ConfigError, match=r"optim\.decay_steps=400 keeps the learning-rate schedule"):
        check("train.steps=600")
    check("train.steps=600", "optim.decay_steps=400")


def test_allowing_another_length_allows_the_decay_that_follows_from_it() -> None:
    check("train.steps=600", "checkpoint.allow_changes=[train.steps]")


def test_allowing_another_length_allows_no_decay_that_is_set() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.decay_steps=500: "):
        check("train.steps=600", "optim.decay_steps=500", "checkpoint.allow_changes=[train.steps]")


def test_settings_that_keep_the_experiment_exist() -> None:
    names = [name for name, _ in settings_by_name(asdict(pretrain("+model=tiny_hybrid")))]
    for known in KEEP_THE_EXPERIMENT:
        assert any(name == known or name.startswith(f"{known}.") for name in names), known
