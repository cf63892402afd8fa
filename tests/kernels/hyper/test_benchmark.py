"""The benchmark of HyperAttention compares results before it times."""

import json
from pathlib import Path

import pytest
import torch
from s2train.kernels.benchmarks import hyper

SMALL = "--device cpu --heads 4 --kv-heads 2 --dim 16 --bucket 16 --samples 8 --shortest 32 --window 16 --sinks 16"


def test_results_are_compared_with_the_oracle_first(tmp_path: Path) -> None:
    output = tmp_path / "hyper.json"
    assert hyper.main([*SMALL.split(), "--output", str(output), "--cases"]) == 0
    found = json.loads(output.read_text())
    assert found["cases"] == []
    assert all(0 < ratio <= 2 for ratios in found["check"].values() for ratio in ratios.values())


def test_nothing_is_timed_after_a_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hyper.hyper_attention
    monkeypatch.setattr(hyper, "hyper_attention", lambda *args, **options: right(*args, **options) * 1.1)
    output = tmp_path / "hyper.json"
    assert hyper.main([*SMALL.split(), "--output", str(output), "--cases", "4k-causal"]) == 1
    assert json.loads(output.read_text())["cases"] == []


def test_a_case_has_the_layer_and_says_why_a_contender_did_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hyper.LENGTHS, "4k", 100)
    output = tmp_path / "hyper.json"
    words = [*SMALL.split(), "--budget-ms", "1", "--output", str(output), "--cases", "4k-causal", "4k-full"]
    assert hyper.main(words) == 0
    for case in json.loads(output.read_text())["cases"]:
        assert case["layers"]["hyper"]["ms"]["both"] > 0
        assert case["layers"]["flash2"]["error"].startswith("not supported")
    assert torch.cuda.is_available() or case["phases"] == {}


def test_results_are_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "hyper.json"
    output.touch()
    with pytest.raises(SystemExit):
        hyper.main([*SMALL.split(), "--output", str(output)])
