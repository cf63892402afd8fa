"""What the kernels' tests share. Without a GPU they run in Triton's interpreter (tests/conftest.py)."""

from collections.abc import Iterator

import pytest
import torch
from s2train.kernels.check import poison


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Kernel outputs start as NaN, so that a row left unwritten shows."""
    with poison.poisoned():
        yield


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    """New inputs in every run; the seed is printed where a test fails."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
