"""The benchmark of single eager calls runs contenders in turn, and writes what it prints."""

import json
from pathlib import Path

import pytest
from s2train.kernels.benchmarks import eager


def test_contenders_calls_are_timed_forward_and_with_the_backward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "eager.json"
    words = "--device cpu --cases b16-l1-v2-64-h2-d16 --rounds 2 --output"
    assert eager.main([*words.split(), str(output)]) == 0
    data = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == data
    (case,) = data["cases"]
    assert all(case["results"]["ours"][which]["eager_ms"] > 0 for which in ("forward", "both"))
    assert case["results"]["cudnn"]["error"] == "not supported: needs CUDA"
