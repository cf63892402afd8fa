"""The benchmark of split columns checks before it times, and compares both ways."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from s2train.kernels import BlockLayout
from s2train.kernels.benchmarks import split_columns
from s2train.kernels.benchmarks.split_columns import SplitCase

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in Triton's interpreter")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    def make(length: int, device: torch.device) -> BlockLayout:
        return BlockLayout.from_mask(torch.ones(1, 1, 1) > 0, 32)

    monkeypatch.setitem(split_columns.SPLIT_CASES, "hyper-32k", SplitCase(20, 1, 1, make, (1.0, 1.0)))
    words = "--device cpu --backend portable --budget-ms 1 --cases hyper-32k --checks"
    return [*words.split(), "--output", str(tmp_path / "split.json")]


def results(arguments: list[str]) -> Any:
    return json.loads(Path(arguments[-1]).read_text())


def test_both_ways_are_timed_and_compared(arguments: list[str]) -> None:
    assert split_columns.main(arguments) == 0
    (case,) = results(arguments)["cases"]
    assert all(case["results"][name]["ms"]["backward"] > 0 for name in ("whole", "split"))
    assert all(difference <= 1e-6 for difference in case["differences"].values())


def test_results_that_differ_are_an_error(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = split_columns.block_sparse_attention

    def wrong(*tensors: Any, split_columns: bool, **options: Any) -> Any:
        return right(*tensors, **options) * (1.1 if split_columns else 1)

    monkeypatch.setattr(split_columns, "block_sparse_attention", wrong)
    assert split_columns.main(arguments) == 1
    assert "differ" in results(arguments)["cases"][0]["error"]


def test_nothing_is_timed_after_a_wrong_check(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_columns, "check_case", lambda case, device: {"ok": False})
    at = arguments.index("--checks") + 1
    assert split_columns.main([*arguments[:at], "split, block 64", *arguments[at:]]) == 1
    assert results(arguments)["cases"] == []
