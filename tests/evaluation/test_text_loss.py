"""The loss of a text is the mean over its counted tokens, whole and by position."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from s2train.evaluation.text_loss import TextLoss, measure
from s2train.evaluation.windows import Window, cut

CPU = torch.device("cpu")


def score(windows: Sequence[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """A model whose loss on a token is a tenth of its id, and which predicts even ones."""
    longest = max(len(window.tokens) for window in windows)
    losses = torch.full((len(windows), longest), 99.0)
    counted = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        targets = torch.from_numpy(window.targets)
        losses[row, : len(targets)] = targets / 10
        counted[row, window.first : len(targets)] = True
    return losses, (losses * 10).round().long() % 2 == 0, counted


def measured(ids: np.ndarray, length: int, stride: int) -> TextLoss:
    return measure(list(cut(ids, length, stride)), length, 2, score, CPU, text_bytes=80)


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_the_loss_is_the_mean_over_all_tokens_but_the_first(stride: int) -> None:
    ids = np.random.default_rng().integers(0, 60, 45)
    found = measured(ids, 16, stride)
    assert found.tokens == 44
    assert found.held_out.loss == pytest.approx(np.mean(ids[1:]) / 10, rel=1e-6)
    assert found.correct == sum(ids[1:] % 2 == 0)
    assert found.perplexity == pytest.approx(math.exp(np.mean(ids[1:]) / 10), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(ids[1:].sum() / 10 / math.log(2) / 80, rel=1e-6)


def test_losses_are_sorted_by_their_position_in_the_window() -> None:
    ids = np.random.default_rng().integers(0, 60, 33)
    by_position = {(first, stop): loss for first, stop, loss in measured(ids, 16, 16).held_out.by_position}
    both = np.stack([ids[1:17], ids[17:33]])
    assert set(by_position) == {(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)}
    for (first, stop), loss in by_position.items():
        assert loss == pytest.approx(both[:, first:stop].mean() / 10, rel=1e-6)


def test_sliding_windows_count_later_tokens_at_the_windows_end() -> None:
    found = measured(np.arange(65) % 50, 16, 4)
    counts = [loss is not None for *_, loss in found.held_out.by_position]
    assert counts == [True] * 5
    ids = np.arange(65) % 50
    last = next(loss for first, _, loss in found.held_out.by_position if first == 8)
    assert last == pytest.approx(np.concatenate([ids[9:17], ids[17:]]).mean() / 10, rel=1e-6)


def test_a_text_whose_first_tokens_are_not_predicted_has_no_bits_per_byte() -> None:
    ids = np.arange(10)
    assert measure(list(cut(ids, 4, 4)), 4, 8, score, CPU, text_bytes=None).bits_per_byte is None


def test_a_loss_beyond_a_float_has_an_infinite_perplexity() -> None:
    assert measured(np.full(5, 8000), 4, 4).perplexity == math.inf
