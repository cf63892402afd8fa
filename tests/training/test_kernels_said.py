"""A run says once which attention kernels its sparse layers run."""

from pathlib import Path

import pytest
import torch

from tests.program import pretrain

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="says what a CPU runs")]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_first_step_says_which_kernels_ran_and_why(backend: str, tmp_path: Path) -> None:
    done = pretrain(tmp_path, "train.steps=4", f"attention_backend={backend}")
    assert done.status == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("sparse attention:")]
    why = {"auto": "no CUDA device", "torch": "backend=torch"}[backend]
    assert lines == [f"sparse attention: forward torch ({why}), backward torch ({why})"]


def test_a_dense_model_says_nothing_of_them(tmp_path: Path) -> None:
    done = pretrain(tmp_path, "train.steps=3", "layout.layers=D")
    assert done.status == 0, done.err
    assert "sparse attention:" not in done.out
