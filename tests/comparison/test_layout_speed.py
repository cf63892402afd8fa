"""Attention of layouts is timed layer by layer, each distinct one once, after a check, and a stopped run resumes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from s2train.kernels.dense import dense_causal_attention
from torch import Tensor

from s2train.comparison import layer_speed
from s2train.comparison.layer_speed import LayerTimer, Sizes
from s2train.planning import compose_run
from tests.program import Outcome, run

MODEL = ["+model=tiny_dense", "model.hidden_size=64", "model.num_layers=4", "model.num_attention_heads=4"]
MODEL += ["model.num_query_groups=2", "model.head_dim=16", "model.ffn_hidden_size=64"]
SHORT = ["--lengths", "256", "--check-length", "100", "--budget-ms", "2"]
LAYOUT = """
layers: S
block_size: 16
pattern:
  kind: per_head
  rules:
  - {kind: span, base: 2, slope: 0.1, sinks: 1}
  - {kind: dense}
  - {kind: sliding_window, window: WINDOW}
  heads: [[0, 0, 2, 2], [1, 1, 1, 1], [0, 0, 2, 2], [2, 2, 0, 0]]
"""


@pytest.fixture(autouse=True)
def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two layouts that differ in two of three distinct layers; the window of `wide` keeps everything."""
    for name, window in (("narrow", "2"), ("wide", "16")):
        (tmp_path / f"{name}.yaml").write_text(LAYOUT.replace("WINDOW", window))
    return [str(tmp_path / f"{name}.yaml") for name in ("narrow", "wide")]


def timed(output: Path, *arguments: str) -> Outcome:
    return run("s2train.comparison.layout_speed", *MODEL, *SHORT, *arguments, "--output", str(output), processes=0)


def test_rows_sum_their_layers_and_equal_layers_are_timed_once(files: list[str], tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    timed(output, "--layouts", *files).succeeded()
    data = json.loads(output.read_text())
    narrow, wide = data["rows"]
    assert [narrow["layout"], wide["layout"]] == ["narrow.yaml", "wide.yaml"]
    assert narrow["distinct_layers"] == wide["distinct_layers"] == 3
    assert len(data["layers"]) == 5  # both layouts' dense layer is one
    assert narrow["density"] < wide["density"] < 1
    first, dense, last = data["layers"][:3]
    assert dense["density"] == 1
    for own, theirs in (("forward_ms", "forward"), ("forward_backward_ms", "both")):
        summed = 2 * first["ms"][theirs] + dense["ms"][theirs] + last["ms"][theirs]
        assert narrow[own] == pytest.approx(summed)
        (of_all,) = data["dense"]
        assert of_all[own] == pytest.approx(4 * of_all["ms"][theirs])
        assert narrow["over_dense"]["auto"][own] == pytest.approx(of_all[own] / narrow[own])
    assert not any(record["check"]["wrong"] for record in (*data["layers"], *data["dense"]))
    assert data["environment"]["device"] == "CPU"


def test_a_stopped_run_resumes_with_what_it_lacks(files: list[str], tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    assert timed(output, "--layouts", *files).status == 0
    whole = json.loads(output.read_text())
    stopped: dict[str, Any] = whole | {"rows": whole["rows"][:1], "layers": whole["layers"][:-1]}
    output.write_text(json.dumps(stopped))
    assert timed(output, "--layouts", *files).status == 0
    resumed = json.loads(output.read_text())
    assert resumed["dense"] == whole["dense"]
    assert resumed["layers"][:-1] == whole["layers"][:-1]
    assert resumed["layers"][-1]["layer"] == whole["layers"][-1]["layer"]
    assert resumed["layers"][-1]["ms"] != whole["layers"][-1]["ms"]
    assert resumed["rows"][0] == whole["rows"][0]
    other = timed(output, "--layouts", *files, "dense_attention=s2train")
    assert other.status == 2
    assert "has results of other settings" in other.err


def test_what_differs_from_the_oracle_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_run([*MODEL, "train.precision=bf16"])
    timer = LayerTimer(cfg, Sizes(4, 2, 16), torch.device("cpu"), check_length=100, budget_ms=1)
    assert timer.time_dense("auto", 64)["ms"]["both"] > 0

    def off_by_one(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return dense_causal_attention(q, k.roll(1, 0), v.roll(1, 0), **settings)

    monkeypatch.setattr(layer_speed, "dense_causal_attention", off_by_one)
    record = LayerTimer(cfg, Sizes(4, 2, 16), torch.device("cpu"), 100, 1).time_dense("auto", 64)
    assert set(record["check"]["wrong"]) == {"out", "dq", "dk", "dv"}
    assert "ms" not in record


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["layout=moba_b16_k3"], "the data choose what some layers read"),
        (["layout=dense", "--layouts", "a.yaml"], "--layouts names layouts too"),
        (["--layouts", "a.yaml", "b/a.yaml"], "two files have this name"),
    ],
)
def test_layouts_that_cannot_be_timed_are_rejected(arguments: list[str], problem: str, tmp_path: Path) -> None:
    done = timed(tmp_path / "speed.json", *arguments)
    assert done.status == 2
    assert problem in done.err


def test_a_file_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text("notes")
    done = timed(tmp_path / "speed.json", "layout=dense")
    assert done.status == 2
    assert "holds no results of this program" in done.err
    assert (tmp_path / "speed.json").read_text() == "notes"
