"""An export's prefill is timed beside our engine's."""

import json
from pathlib import Path

import pytest

from tests.program import run


def test_both_read_every_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "speed.json"
    settings = ["+model=tiny_hybrid", "--lengths", "130", "257", "--runs", "1", "--output", str(output)]
    run("s2train.comparison.export_speed", *settings, processes=0).succeeded()
    data = json.loads(output.read_text())
    assert "+model=tiny_hybrid" in data["command"]
    assert [case["length"] for case in data["cases"]] == [130, 257]
    for case in data["cases"]:
        assert case["engine_s"] > 0
        assert case["export_over_engine"] == pytest.approx(case["export_s"] / case["engine_s"])


def test_a_model_without_an_export_is_rejected() -> None:
    done = run("s2train.comparison.export_speed", "+model=tiny_moba", processes=0)
    assert done.status == 2
    assert "layout.layers" in done.err
