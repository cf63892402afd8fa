"""Lengths in tokens become steps, once, and contradictions are rejected."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from s2train.command_line.composition import CONF
from s2train.config import PretrainConfig, register
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, format_plan

CPU = Hardware("CPU", "cpu", 1 << 36)
MODEL = "+model=tiny_hybrid"  # whose file sets 400 steps of 16 × 256 = 4,096 tokens, 40 of them warm-up


def rejection(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        check(compose_run([MODEL, *overrides]), 1, CPU)
    return raised.value


def lengths(cfg: PretrainConfig) -> tuple[int | None, ...]:
    return cfg.train.steps, cfg.optim.warmup_steps, cfg.optim.decay_steps, cfg.optim.wsd_decay_steps


@pytest.mark.parametrize(
    ("tokens", "steps"), [("1", 1), ("4096", 1), ("4097", 2), ("4.096e5", 100), ("1e6", 245), ("1_000_000", 245)]
)
def test_a_run_takes_as_many_steps_as_hold_its_tokens(tokens: str, steps: int) -> None:
    cfg = compose_run([MODEL, f"train.tokens={tokens}"])
    assert cfg.train.steps == steps
    assert cfg.train.tokens == float(tokens)


def test_steps_follow_the_batch_and_the_length() -> None:
    sizes = ["train.global_batch_size=8", "train.seq_length=128"]
    assert compose_run([MODEL, "train.tokens=4096", *sizes]).train.steps == 4


def test_every_length_of_the_learning_rate_may_be_in_tokens() -> None:
    budgets = ["train.tokens=819200", "optim.warmup_tokens=8192", "optim.decay_tokens=4.1e5"]
    assert lengths(compose_run([MODEL, *budgets])) == (200, 2, 101, None)
    wsd = ["optim=wsd", "optim.warmup_tokens=0", "optim.wsd_decay_tokens=81920"]
    assert lengths(compose_run([MODEL, "train.tokens=819200", *wsd])) == (200, 0, None, 20)


def test_nothing_is_derived_without_tokens() -> None:
    assert lengths(compose_run([MODEL])) == (400, 40, None, None)


def test_tokens_replace_steps_of_a_model_or_of_none() -> None:
    assert compose_run([MODEL, "train.steps=???", "train.tokens=8192"]).train.steps == 2


def test_steps_that_say_the_same_are_accepted() -> None:
    assert compose_run([MODEL, "train.tokens=8192", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize("setting", ["train.steps", "optim.warmup_steps", "optim.decay_steps", "optim.wsd_decay_steps"])
def test_steps_that_contradict_tokens_are_rejected(setting: str) -> None:
    tokens = setting.replace("steps", "tokens")
    error = rejection(f"{tokens}=8192", f"{setting}=3")
    assert (error.setting, error.value) == (setting, 3)
    assert f"{tokens}=8192 is 2 steps of 4,096 tokens" in error.problem
    assert f"{tokens}=null" in error.remedy


def test_a_file_that_sets_both_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = "# @package _global_\ntrain:\n  tokens: 8192\n  steps: 2\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    register()
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(ConfigError, match=r"train.tokens=8192: experiment/mine.yaml sets train.steps=2 as well"),
    ):
        compose("pretrain", [MODEL, f"hydra.searchpath=[{tmp_path}]", "+experiment=mine"])


@pytest.mark.parametrize("tokens", ["0", "-4096", "1.5", "inf", "nan"])
def test_what_is_no_number_of_tokens_is_rejected(tokens: str) -> None:
    assert rejection(f"train.tokens={tokens}").setting == "train.tokens"


@pytest.mark.parametrize("setting", ["train.tokens", "optim.warmup_tokens"])
def test_a_new_phase_counts_in_steps(setting: str) -> None:
    error = rejection(f"{setting}=8192", "checkpoint.new_data=true", "checkpoint.resume=runs/before")
    assert error.setting == setting
    assert setting.replace("tokens", "steps") in error.remedy


def test_steps_of_a_batch_ramp_up_are_not_counted_in_tokens() -> None:
    error = rejection("train.tokens=40960", "train.rampup_batch_size=[8,8,64]")
    assert error.setting == "train.tokens"
    assert "train.rampup_batch_size" in error.problem


def test_errors_name_the_tokens_that_were_set() -> None:
    late = rejection("train.tokens=40960", "optim.warmup_tokens=40961")
    assert (late.setting, late.value) == ("optim.warmup_tokens", 40961)
    assert "train.tokens=40,960 (10 steps)" in late.problem
    assert "less than 40960, such as 4096" in late.remedy
    stop = rejection("train.tokens=40960", "optim.warmup_tokens=0", "train.exit_step=11")
    assert "train.tokens=40,960 (10 steps)" in stop.problem
    last = rejection("train.tokens=40960", "optim=wsd", "optim.warmup_tokens=4096", "optim.wsd_decay_tokens=40960")
    assert (last.setting, last.remedy) == ("optim.wsd_decay_tokens", "Set optim.wsd_decay_tokens to 36864 or less.")


def test_the_plan_says_how_many_steps_follow() -> None:
    plan = check(compose_run([MODEL, "train.tokens=4e6", "optim.warmup_tokens=1e5"]), 1, CPU)
    assert "budget        train.tokens=4,000,000 (977 steps), optim.warmup_tokens=100,000 (25 steps)" in format_plan(
        plan
    )
    assert "budget" not in format_plan(check(compose_run([MODEL]), 1, CPU))
