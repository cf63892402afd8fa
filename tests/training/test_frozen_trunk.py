"""The trunk stays frozen, and the learning rate warms up again afterwards."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from s2train.training.frozen_trunk import FrozenTrunk, LearningRateSchedule

STEPS = 20


def schedule(*, frozen: int = 8, second_warmup: int = 4, style: str = "linear") -> LearningRateSchedule:
    optimizer: Any = SimpleNamespace(param_groups=[{}])
    return LearningRateSchedule(
        optimizer,
        frozen=frozen,
        second_warmup=second_warmup,
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.1,
        lr_warmup_steps=4,
        lr_decay_steps=STEPS,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=STEPS,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def rates(of: LearningRateSchedule, steps: int = STEPS) -> list[float]:
    """Learning rates of the next steps."""
    found = []
    for _ in range(steps):
        found.append(of.optimizer.param_groups[0]["lr"])
        of.step(1)
    return found


@pytest.mark.parametrize("style", ["linear", "cosine", "constant", "inverse-square-root"])
def test_the_rate_rises_from_0_to_the_schedules_when_the_trunk_is_thawed(style: str) -> None:
    usual, found = rates(schedule(frozen=0, style=style)), rates(schedule(style=style))
    assert found[:8] == usual[:8]
    assert found[8:12] == pytest.approx([usual[8 + i] * i / 4 for i in range(4)])
    assert found[12:] == usual[12:]


def test_without_a_second_warm_up_the_trunk_begins_at_the_schedules_rate() -> None:
    assert rates(schedule(second_warmup=0)) == rates(schedule(frozen=0))


def test_a_schedule_resumes_within_the_second_warm_up() -> None:
    whole, resumed = schedule(), schedule()
    rates(whole, 10)
    resumed.load_state_dict(whole.state_dict())
    assert rates(resumed, 10) == rates(whole, 10)


def test_after_a_skipped_step_the_trunk_still_begins_with_the_second_warm_up() -> None:
    of, trunk = schedule(frozen=3), torch.nn.Linear(2, 2, bias=False)
    frozen, found = FrozenTrunk([trunk], last=3), []
    for is_skipped in (False, True, False, False, False):
        trunk.weight.main_grad = torch.ones(2, 2)  # type: ignore[assignment]
        frozen.hold(of.optimizer, of.num_steps)
        if trunk.weight.main_grad.any():
            found.append(of.optimizer.param_groups[0]["lr"])
        of.step(0 if is_skipped else 1)
    assert found == [0.0]  # the first step of the second warm-up
