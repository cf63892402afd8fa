"""Pages are allocated once and can be freed."""

import numpy as np
import pytest
import torch

from s2train.inference.page_pool import OutOfPagesError, PagePool


def pool(num_pages: int) -> PagePool:
    return PagePool(num_pages, 16, 8, torch.float32, torch.device("cpu"))


def test_no_page_is_allocated_twice() -> None:
    pages, rng = pool(20), np.random.default_rng()
    held: list[int] = []
    for _ in range(100):
        held += pages.take(int(rng.integers(0, 21 - len(held)))).tolist()
        assert len(set(held)) == len(held) == pages.used
        assert all(0 <= page < 20 for page in held)
        rng.shuffle(held)
        returned = int(rng.integers(0, len(held) + 1))
        pages.give(np.array(held[:returned], dtype=np.int32))
        held = held[returned:]


def test_allocating_too_many_pages_is_rejected_and_allocates_none() -> None:
    pages = pool(3)
    pages.take(2)
    with pytest.raises(OutOfPagesError, match="2 pages of 1,024 bytes are needed, but 1 of 3 are free"):
        pages.take(2)
    assert pages.used == 2


def test_a_page_has_the_bytes_of_its_tensors() -> None:
    pages = pool(7)
    assert pages.page_bytes * 8 == pages.keys.nbytes + pages.values.nbytes
