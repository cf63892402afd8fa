"""The timing of whole models works on a CPU."""

import json
from pathlib import Path

import pytest

from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.inference.decode_speed import check_weights
from s2train.planning import compose_run, hybrid_layout
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
    run("s2train.inference.decode_speed", *settings, "--output", str(output), processes=0).succeeded()
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
    run("s2train.inference.decode_speed", *settings, "--output", str(output), processes=0).succeeded()
    (record,) = json.loads(output.read_text())["cases"]
    assert record["kv_bytes"] == record["dense_bytes"]
    assert record["read_bytes"] < record["kv_bytes"] / 2
    assert record["state_bytes"] > 0


@pytest.mark.slow
def test_a_layout_of_a_file_is_timed_from_its_prompt_to_its_first_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    output, layout = tmp_path / "speed.json", tmp_path / "chosen.yaml"
    row = "[0, 0, 1, 1]"
    layout.write_text(
        "layers: S\nblock_size: 16\npattern:\n  kind: per_head\n"
        "  rules: [{kind: span, base: 2, slope: 0.1, sinks: 1}, {kind: local_vertical, local: 2, stride: 4}]\n"
        f"  heads: [{', '.join([row] * 4)}]\n"
    )
    settings = ["+model=tiny_hybrid", "model.num_layers=4", "model.num_attention_heads=4", "model.num_query_groups=2"]
    options = ["--lengths", "300", "--batches", "1", "--tokens", "2", "--output", str(output)]
    run("s2train.inference.decode_speed", *settings, f"layout=file:{layout}", *options, processes=0).succeeded()
    (record,) = json.loads(output.read_text())["cases"]
    assert record["prefill_s"] > 0
    assert 0 < record["kv_bytes"] == record["predicted_bytes"] < record["dense_bytes"]


def test_a_model_larger_than_the_memory_is_not_built() -> None:
    cfg = compose_run(["+model=7b_hybrid"])
    with pytest.raises(ConfigError, match=r"weights take 1\d\.\d GiB, and CPU has 7\.5.*tiny_hybrid"):
        check_weights(cfg, hybrid_layout(cfg), Hardware("CPU", "cpu", int(7.5 * 2**30)))
    check_weights(cfg, hybrid_layout(cfg), Hardware("CPU", "cpu", 64 * 2**30))
