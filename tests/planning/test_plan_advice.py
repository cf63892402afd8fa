"""A plan that fits suggests faster settings that also fit."""

from dataclasses import replace

from s2train.planning import check, format_plan
from tests.validation.test_rejections import CPU, GIB, GPU, config


def test_with_free_memory_less_recomputation_and_a_larger_micro_batch_are_suggested() -> None:
    plan = check(config(train__recompute="full"), 1, GPU)
    assert plan.advice is not None
    assert "train.recompute=none" in plan.advice
    assert "train.micro_batch_size=16" in plan.advice  # the global batch
    assert plan.advice in format_plan(plan)


def test_advice_stays_within_nine_tenths_of_the_device() -> None:
    cfg = config(train__micro_batch_size=1)
    needed = check(replace(cfg, train=replace(cfg.train, micro_batch_size=4)), 1, GPU).memory.total
    plan = check(cfg, 1, replace(GPU, memory=round(1.05 * needed)))
    assert plan.advice is not None
    assert "micro_batch_size=2 " in plan.advice
    plan = check(cfg, 1, replace(GPU, memory=round(1.15 * needed)))
    assert plan.advice is not None
    assert "micro_batch_size=4 " in plan.advice


def test_there_is_no_advice_without_room_nor_on_a_cpu() -> None:
    cfg = config(train__micro_batch_size=1)
    needed = check(cfg, 1, GPU).memory.total
    assert check(cfg, 1, replace(GPU, memory=needed + GIB // 8)).advice is None
    assert check(config(train__recompute="full"), 1, CPU).advice is None
