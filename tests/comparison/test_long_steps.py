"""launch/long_steps.py measures each way in a process of its own, and goes on where it was broken off."""

import json
from pathlib import Path

import pytest
import torch

from s2train.comparison.long_steps import WAYS, case_overrides, fitting
from s2train.hardware import Hardware, gpu_rates
from s2train.planning import compose_run
from tests.program import run

H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576, gpu_rates("NVIDIA H100 80GB HBM3"), (9, 0))
SMALL = ["--size", "tiny", "--layers", "4", "--tokens", "512", "--steps", "1", "--warmup", "1"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="names what a CPU compares")
def test_measures_what_is_missing_and_saves_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "long.json"  # or without the suffix
    arguments = [str(output), "--lengths", "256", *SMALL, f"run_dir={tmp_path / 'run'}"]
    done = run("long_steps.py", *arguments, processes=0)
    assert done.status == 0, done.err
    content = json.loads((tmp_path / "long.json").read_text())
    assert [(row["way"], row["seq_length"], row["layers"]) for row in content["rows"]] == [
        ("hybrid", 256, 4),
        ("dense", 256, 4),
    ]
    assert content["command"].endswith(f"{output} --lengths 256 {' '.join([*SMALL, f'run_dir={tmp_path}/run'])}")
    for row in content["rows"]:
        assert row["tokens_per_s"] == pytest.approx(512 / row["step_s"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.json", "long.png"]

    content["rows"] = content["rows"][:1]
    (tmp_path / "long.json").write_text(json.dumps(content))
    again = run("long_steps.py", *arguments, processes=0)
    assert again.status == 0, again.err
    assert "hybrid, 256" not in again.out
    assert "dense, 256" in again.out
    assert json.loads((tmp_path / "long.json").read_text())["rows"][0] == content["rows"][0]


def test_a_way_that_fails_is_told_and_left_out(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "long"), "--lengths", "256", *SMALL, "backend=te"]
    done = run("long_steps.py", *arguments, processes=0)
    assert done.status == 2
    assert "failed: hybrid: error: backend=te" in done.out
    assert not (tmp_path / "long.json").exists()


def test_as_many_layers_as_fit_are_taken_the_same_for_every_way() -> None:
    short, long = (fitting("7b", length, 131072, None, H100, ["model.vocab_size=8192"]) for length in (8192, 131072))
    assert short[0] % 4 == long[0] % 4 == 0
    assert short[0] >= long[0] > 0
    assert (short[1], long[1]) == ("none", "full")


def test_dense_ways_differ_in_the_implementation_alone() -> None:
    ours, cudnn, flash = (compose_run(case_overrides("7b", way, 8192, 131072, 4, "none")) for way in WAYS)
    assert [cfg.dense_attention for cfg in (ours, cudnn, flash)] == ["auto", "cudnn", "flash"]
    flash.dense_attention = "cudnn"
    assert flash == cudnn
    assert set(ours.layout.layers) == {"D", "S"}
    assert ours.train.global_batch_size * ours.train.seq_length == 131072
