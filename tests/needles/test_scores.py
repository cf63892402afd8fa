"""Scores have confidence intervals and effective lengths."""

import math

import numpy as np
import pytest

from s2train.needles.results import Cell, NeedleResults
from s2train.needles.scores import Score, effective_length, wilson_interval


def test_the_share_is_1_96_deviations_from_the_ends_of_its_interval() -> None:
    for trials in np.random.default_rng().integers(1, 500, size=20).tolist():
        for correct in (0, trials // 3, trials):
            low, high = wilson_interval(correct, trials)
            assert low <= correct / trials <= high
            for end in (low, high):
                if 1e-12 < end < 1 - 1e-12:
                    deviation = math.sqrt(end * (1 - end) / trials)
                    assert abs(correct / trials - end) / deviation == pytest.approx(1.96, abs=1e-3)


def test_perfect_scores_have_an_interval_too() -> None:
    low, high = wilson_interval(100, 100)
    assert high == 1
    assert low == pytest.approx(0.963, abs=1e-3)


def test_the_effective_length_is_the_largest_that_reaches_the_threshold() -> None:
    scores = [(4096, Score(9, 10)), (8192, Score(5, 10)), (16384, Score(9, 10)), (32768, Score(8, 10))]
    assert effective_length(scores, 0.856) == 16384
    assert effective_length(scores, 0.8) == 32768
    assert effective_length(scores, 0.95) is None


def test_a_length_counts_when_all_its_depths_are_known() -> None:
    cells = [Cell(256, 0.0, 4, 4, 1, 1), Cell(256, 1.0, 3, 4, 1, 1), Cell(512, 0.0, 4, 4, 1, 1)]
    results = NeedleResults("runs/x", 1, {}, [512, 256], [0.0, 1.0], cells)
    assert results.columns == [(256, Score(7, 8))]
    assert results.effective_length == 256


def test_values_found_are_summed_only_if_every_cell_has_them() -> None:
    cells = [Cell(256, depth, 0, 4, 0, 0, values_found=found, values=4) for depth, found in ((0.0, 4), (1.0, 3))]
    results = NeedleResults("runs/x", 1, {}, [256], [0.0, 1.0], cells)
    assert (results.contained, results.contained_columns) == (Score(7, 8), [(256, Score(7, 8))])
    results.add(Cell(256, 1.0, 0, 4, 0, 0))  # as from an older file
    assert (results.contained, results.contained_columns) == (None, [])
