"""The timing of whole models works on a CPU."""

import json
from pathlib import Path

import pytest

from tests.program import run


@pytest.mark.slow
@pytest.mark.parametrize("prompts", ["read", "random"])
def test_a_cache_is_timed_and_has_the_predicted_bytes(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "speed.json"
    settings = ["+model=tiny_hybrid", "--lengths", "300", "--batches", "2", "--tokens", "5", "--chunk", "128"]
    if prompts == "random":
        settings.append("--no-prefill")
    done = run("s2train.inference.decode_speed", *settings, "--output", str(output), processes=0)
    assert done.status == 0, done.err[-2000:]
    data = json.loads(output.read_text())
    assert "+model=tiny_hybrid" in data["command"]
    assert data["device"] == "CPU"
    (record,) = data["cases"]
    assert all(record.get(name, 0) > 0 for name in ("prefill_s", "forward_s")) or prompts == "random"
    assert record["step_ms"] > 0
    assert 0 < record["kv_bytes"] == record["predicted_bytes"] < record["dense_bytes"]
    assert record["kv_bytes"] <= record["pool_bytes"]
    assert 0 < record["read_bytes"] <= record["kv_bytes"]
    assert record["state_bytes"] == 0


@pytest.mark.slow
def test_a_step_of_selected_blocks_reads_less_than_the_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output = tmp_path / "speed.json"
    settings = ["+model=tiny_moba", "layout.layers=E", "--lengths", "600", "--batches", "2", "--tokens", "2"]
    done = run("s2train.inference.decode_speed", *settings, "--output", str(output), processes=0)
    assert done.status == 0, done.err[-2000:]
    (record,) = json.loads(output.read_text())["cases"]
    assert record["kv_bytes"] == record["dense_bytes"]
    assert record["read_bytes"] < record["kv_bytes"] / 2
    assert record["state_bytes"] > 0
