"""The trained model that the demo ships: small, as its recipe says, and it retrieves."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from s2train.needles.results import load_results
from s2train.planning import compose_run
from tests.program import ROOT, run

MODEL = ROOT / "launch/results/demo/model"


def test_the_shipped_folder_is_small_and_its_provenance_names_these_weights() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4e6
    provenance = json.loads((MODEL / "provenance.json").read_text())
    assert provenance["sha256"] == hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()


def test_the_shipped_model_is_the_one_that_the_demo_trains() -> None:
    demo, shipped = compose_run(["+model=demo_hybrid"]), json.loads((MODEL / "config.json").read_text())
    layout, here = shipped["s2train"]["layout"], asdict(demo.layout)
    pattern = dict.fromkeys(here["pattern"]) | layout["pattern"]
    assert {"kinds": {}} | layout | {"pattern": pattern} == here  # exported before there were kinds and some settings
    assert shipped["s2train"]["schedule"] == asdict(demo.schedule)
    names = {
        "num_layers": "num_hidden_layers",
        "num_query_groups": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
    }
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "head_dim", "vocab_size"):
        assert shipped[names.get(name, name)] == getattr(demo.model, name)


@pytest.mark.slow
def test_the_shipped_model_retrieves_needles(tmp_path: Path) -> None:
    run(
        "import.py",
        f"weights={MODEL}",
        f"output={tmp_path}/run",
        f"conf={tmp_path}/conf",
        "precision=fp32",
        processes=0,
    ).succeeded()
    run(
        "needle.py", f"checkpoint={tmp_path}/run", "lengths=[256]", "depths=[0,0.5,1]", "trials=8", "batch_size=24"
    ).succeeded()
    results = load_results(tmp_path / "run/needle/needle.json")
    assert results is not None
    assert results.score is not None
    assert results.score.share >= 0.75
