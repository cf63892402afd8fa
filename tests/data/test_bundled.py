import hashlib
import math

import numpy as np
import pytest

from s2train.data.bundled import bundled_corpus_files, count_ids, unigram_entropy


def test_the_corpus_has_the_sizes_and_hashes_in_its_licence_note() -> None:
    files = bundled_corpus_files()
    note = (files[0].parent / "LICENSE.md").read_text()
    assert [file.name for file in files] == ["alice29.txt", "asyoulik.txt", "plrabn12.txt"]
    for file in files:
        content = file.read_bytes()
        assert f"| {len(content):,} | `{hashlib.sha256(content).hexdigest()}` |" in note


@pytest.mark.parametrize("n", [1, 2, 257])
def test_equally_frequent_tokens_have_the_entropy_log_n(n: int) -> None:
    assert unigram_entropy([5] * n + [0] * 3) == pytest.approx(math.log(n))


def test_entropy_is_the_lowest_cross_entropy_of_any_fixed_distribution() -> None:
    rng = np.random.default_rng()
    tokens = rng.integers(0, 20, 1000) // rng.integers(1, 5, 1000)
    counts = count_ids(tokens, 20)
    other = rng.dirichlet(np.ones(20))
    assert unigram_entropy(counts) == pytest.approx(-np.log((counts / 1000)[tokens]).mean())
    assert unigram_entropy(counts) < -np.log(other[tokens]).mean()
