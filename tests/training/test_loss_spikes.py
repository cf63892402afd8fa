"""Skipped steps are counted and loss spikes detected."""

import random

import pytest

from s2train.training.loss_spikes import LossHistory


def test_consecutive_skipped_steps_count_until_a_step_is_taken() -> None:
    history = LossHistory().after_skip().after_skip().after_step(3.0).after_skip()
    assert (history.skipped, history.skipped_in_row, history.steps) == (3, 1, 1)
    assert history.mean_loss == 3.0


def test_a_loss_far_above_the_running_mean_is_a_spike() -> None:
    level = random.uniform(0.5, 10)
    history = LossHistory()
    for _ in range(50):
        history = history.after_step(level * random.uniform(0.95, 1.05))
    assert history.spike(level * 1.5, factor=2) is None
    assert history.spike(level * 3, factor=2) == pytest.approx(3, rel=0.06)


def test_the_first_losses_are_never_spikes() -> None:
    assert LossHistory().after_step(1.0).spike(100.0, factor=2) is None


def test_the_mean_follows_a_falling_loss() -> None:
    history = LossHistory()
    for _ in range(600):
        history = history.after_step(8.0)
    for _ in range(600):
        history = history.after_step(2.0)
    assert history.mean_loss == pytest.approx(2.0, rel=0.01)
