"""`launch/scaling.py` runs on two processes of the CPU."""

import json
from pathlib import Path

import pytest

from s2train.scaling.parity import STEPS, VARIANTS
from tests.program import error_line, run

TINY = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.vocab_size=272",
    "train.seq_length=128",
]


def test_existing_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text("{}")
    done = run("scaling.py", "two.json", "--parity", processes=0, cwd=tmp_path)  # the suffix is not added twice
    assert done.status == 2
    assert "two.json exists" in error_line(done)


@pytest.mark.long
def test_every_parallelism_agrees_with_one_process(tmp_path: Path) -> None:
    options = [
        "--parity",
        "--parity-at-once",
        "2",
        "--parity-model",
        "tiny_hybrid",
        "--attention-length",
        "512",
        "train.precision=bf16",
    ]
    done = run("scaling.py", "two", *options, *TINY, processes=0, cwd=tmp_path, timeout=1200)
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "two.json").read_text())["parts"]["parity"]
    assert result["errors"] == {}
    assert result["deviation"].keys() == VARIANTS.keys()
    assert {len(result["losses"][name]) for name in ("one", *VARIANTS)} == {STEPS}
    assert result["agrees"], result["deviation"]


@pytest.mark.long
def test_a_resumed_run_on_two_processes_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options = ["--resume", "--parity-model", "tiny_hybrid", "train.precision=bf16"]
    done = run("scaling.py", "two", *options, *TINY, processes=0, cwd=tmp_path, timeout=600)
    assert done.status == 0, done.err
    result = json.loads((tmp_path / "two.json").read_text())["parts"]["resume"]
    assert (result["errors"], result["different_steps"], result["different_values"]) == ({}, [], [])
    assert result["saved_values"] > 40
    assert result["agrees"]


@pytest.mark.long
def test_speed_is_measured_without_a_checkpoint(tmp_path: Path) -> None:
    options = ["--scaling", "--models", "tiny_hybrid", "--seq-length", "128"]
    done = run("scaling.py", "two", *options, *TINY, processes=0, cwd=tmp_path, timeout=600)
    assert done.status == 0, done.err
    rows = json.loads((tmp_path / "two.json").read_text())["parts"]["scaling"]["models"]["tiny_hybrid"]
    assert rows.keys() == {"one", "dp2", "cp2", "tp2"}
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert not list(tmp_path.glob("runs/**/checkpoints"))
    written = (tmp_path / "two.json").stat().st_mtime_ns
    assert run("scaling.py", "two", *options, *TINY, processes=0, cwd=tmp_path, timeout=60).status == 0
    assert (tmp_path / "two.json").stat().st_mtime_ns == written
