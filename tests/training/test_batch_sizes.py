"""Ramp-up of the global batch: Megatron's, in steps, samples and the plan, and exact when resumed."""

import random
from pathlib import Path
from typing import Any

import pytest

from s2train.batch_sizes import Stage, batch_size, samples_of, stages
from s2train.checkpoints.folders import read_progress
from s2train.config import TrainConfig
from s2train.data.checks import num_train_samples
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, format_plan
from s2train.training.records import read_curves
from tests.program import UNSAVED, metrics, pretrain
from tests.validation.test_rejections import CPU

TINY = ["+model=tiny_hybrid", "train.steps=50", "optim.warmup_steps=5", "train.micro_batch_size=2"]
RAMP = ["train.global_batch_size=8", "train.rampup_batch_size=[2,2,12]"]


def test_the_batch_grows_by_equal_increments_after_equal_numbers_of_samples() -> None:
    train = TrainConfig(steps=9, seq_length=8, global_batch_size=8, rampup_batch_size=[2, 2, 12])
    # thresholds at 4, 8 and 12 samples; a step takes the batch of the samples before it
    assert stages(train, 9) == [Stage(2, 2), Stage(4, 1), Stage(6, 1), Stage(8, 5)]
    assert samples_of(train, 9) == 2 * 2 + 4 + 6 + 5 * 8
    assert stages(train, 3, consumed=8) == [Stage(6, 1), Stage(8, 2)]


def test_samples_add_up_from_any_step() -> None:
    first, increment = random.randint(1, 9), random.randint(1, 9)
    whole = first + increment * random.randint(1, 9)
    ramp = [first, increment, random.randint(1, 999)]
    train = TrainConfig(steps=1, seq_length=8, global_batch_size=whole, rampup_batch_size=ramp)
    assert batch_size(train, 0) == first
    assert batch_size(train, ramp[2] + 1) == whole
    before = random.randint(0, 40)
    consumed = samples_of(train, before)
    assert consumed + samples_of(train, 30, consumed) == samples_of(train, before + 30)


def test_without_a_ramp_up_every_step_has_the_same_batch() -> None:
    train = TrainConfig(steps=1, seq_length=8, global_batch_size=6)
    assert (batch_size(train, 10**9), samples_of(train, 7, 3), stages(train, 2)) == (6, 42, [Stage(6, 2)])


def test_the_plan_prints_the_steps_of_each_batch_and_all_tokens() -> None:
    plan = format_plan(check(compose_run([*TINY, *RAMP]), 1, CPU))
    assert "steps by batch: 2 of 2, 1 of 4, 1 of 6, 46 of 8; 382 samples, 97,792 tokens in all" in plan
    assert num_train_samples(compose_run([*TINY, *RAMP])) == 382


@pytest.mark.parametrize(
    ("ramp", "processes", "words"),
    [
        ("[2,2]", 1, ["a first batch, an increment and a number of samples", "or null"]),
        ("[2,0,9]", 1, ["a first batch, an increment and a number of samples"]),
        ("[2,4,9]", 1, ["no number of increments of 4 leads from 2 to train.global_batch_size=8"]),
        ("[8,2,9]", 1, ["leads from 8 to train.global_batch_size=8"]),
        ("[2,2,9]", 4, ["is train.global_batch_size=8 already", "Set train.global_batch_size=16 or more"]),
        ("[2,2,9]", 2, ["2 data parallel ranks × train.micro_batch_size=2", "multiples of 4, such as [4,4,800]"]),
    ],
)
def test_a_ramp_up_that_does_not_divide_is_rejected(ramp: str, processes: int, words: list[str]) -> None:
    cfg = compose_run([*TINY, "train.global_batch_size=8", f"train.rampup_batch_size={ramp}"])
    with pytest.raises(ConfigError) as raised:
        check(cfg, processes, CPU)
    assert str(raised.value).startswith("train.rampup_batch_size=[")
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_new_phase_has_no_ramp_up() -> None:
    cfg = compose_run([*TINY, *RAMP, "checkpoint.resume=runs/before", "checkpoint.new_data=true"])
    with pytest.raises(ConfigError, match=r"^train.rampup_batch_size=.*new phase.*Set train.rampup_batch_size=null"):
        check(cfg, 1, CPU)


def reports(folder: Path) -> list[dict[str, Any]]:
    kept = ("step", "consumed_tokens", "loss", "grad_norm", "lr")
    return [{name: record[name] for name in kept} for record in metrics(folder)]


@pytest.mark.slow
def test_a_run_that_stops_within_its_ramp_up_resumes_bit_for_bit(tmp_path: Path) -> None:
    own = [*RAMP, "train.micro_batch_size=2", "train.steps=6", "optim.warmup_steps=1"]
    pretrain(tmp_path / "whole", *own, UNSAVED, processes=0).succeeded()
    for stop in (["train.exit_step=3"], []):
        done = pretrain(tmp_path / "parts", *own, *stop, processes=0).succeeded()
    assert reports(tmp_path / "parts") == reports(tmp_path / "whole")
    consumed = [record["consumed_tokens"] // 128 for record in reports(tmp_path / "whole")]
    assert consumed == [2, 4, 8, 14, 22, 30]
    assert [read_curves(tmp_path / name / "metrics.jsonl").tokens(5) for name in ("whole", "parts")] == [22 * 128] * 2
    assert "step 5 | the global batch grows from 6 to 8 sequences" in done.out
    assert read_progress(tmp_path / "parts" / "checkpoints" / "iter_0000006").consumed_samples == 30
