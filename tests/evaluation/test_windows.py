"""Windows count each token of a document once, with the context that was asked for."""

import random

import numpy as np
import pytest

from s2train.evaluation.windows import batches, cut


@pytest.mark.parametrize("stride", ["length", "half", 1, "random"])
def test_every_token_but_the_first_is_counted_once(stride: str | int) -> None:
    for _ in range(50):
        length, size = random.randrange(2, 12), random.randrange(2, 40)
        named = {"length": length, "half": max(1, length // 2), "random": random.randrange(1, length + 1)}
        step = named.get(str(stride), 1)
        ids = np.random.default_rng().integers(0, 1000, size)
        windows = list(cut(ids, length, step))
        assert np.array_equal(np.concatenate([w.targets[w.first :] for w in windows]), ids[1:])
        assert all(len(w.tokens) == len(w.targets) <= length for w in windows)
        for window in windows:
            assert np.array_equal(window.tokens[1:], window.targets[:-1])


def test_sliding_windows_give_each_token_the_context_between_length_and_stride() -> None:
    first, *later = cut(np.arange(41), 16, 4)
    assert first.first == 0
    assert all(window.first == 12 for window in later)  # 12 tokens and the one before the target itself


def test_windows_that_do_not_overlap_count_everything() -> None:
    assert [(len(w.tokens), w.first) for w in cut(np.arange(41), 16, 16)] == [(16, 0), (16, 0), (8, 0)]


def test_a_document_of_one_token_has_nothing_to_predict() -> None:
    assert list(cut(np.arange(1), 16, 16)) == []


def test_batches_hold_all_windows_the_longest_first() -> None:
    windows = [w for size in (5, 40, 17, 2) for w in cut(np.arange(size), 16, 16)]
    grouped = list(batches(windows, 3))
    assert sorted(map(id, windows)) == sorted(id(w) for batch in grouped for w in batch)
    lengths = [len(w.tokens) for batch in grouped for w in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert {len(batch) for batch in grouped[:-1]} == {3}
