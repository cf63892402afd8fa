"""`profile.steps` writes a trace and a breakdown of those steps and changes nothing else."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.program import UNSAVED, metrics, pretrain

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="reads the trace of a CPU")]


def test_chosen_steps_are_traced_and_their_time_broken_down(tmp_path: Path) -> None:
    plain, traced = tmp_path / "plain", tmp_path / "traced"
    done = pretrain(traced, "train.steps=5", "profile.steps=[3,4]", "train.recompute=selective", UNSAVED).succeeded()
    assert pretrain(plain, "train.steps=5", "train.recompute=selective", UNSAVED).status == 0
    assert [r["loss"] for r in metrics(traced)] == [r["loss"] for r in metrics(plain)]

    found = json.loads((traced / "profile" / "breakdown-rank0.json").read_text())
    assert (found["steps"], found["device"]) == (2, "cpu")
    attention = {f"attention {kind} {half}" for kind in ("dense", "s2") for half in ("forward", "backward")}
    assert (
        attention | {"linear layers", "norms, elementwise, loss", "optimizer", "data", "host"} <= found["parts"].keys()
    )
    assert sum(found["parts"].values()) == pytest.approx(found["step_ms"])
    assert "where the time of steps 3 to 4 went (cpu)" in done.out

    with gzip.open(traced / "profile" / "trace-rank0.json.gz", "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == 2
    # Two steps of 2 micro batches; core attention runs again in the backward pass. Three layers are sparse.
    assert names.count("s2train: attention s2 backward") == 2 * 2 * 3
    assert names.count("s2train: attention s2 forward") == 2 * 2 * 2 * 3


def test_a_run_that_resumes_among_the_steps_says_which_it_traced(tmp_path: Path) -> None:
    assert pretrain(tmp_path, "train.steps=4", "train.exit_step=2", processes=0).status == 0
    earlier = tmp_path / "profile" / "breakdown-rank0.json"
    earlier.parent.mkdir()
    earlier.write_text("{}")
    done = pretrain(tmp_path, "train.steps=4", "profile.steps=[2,4]", UNSAVED, processes=0)
    assert "where the time of steps 3 to 4 went" in done.out
    assert json.loads(earlier.read_text())["steps"] == 2
    assert earlier.with_name("breakdown-rank0.1.json").read_text() == "{}"


def test_only_chosen_ranks_write_traces(tmp_path: Path) -> None:
    pretrain(
        tmp_path, "train.steps=2", "optim.warmup_steps=1", "profile.steps=[1,2]", "profile.ranks=[1]", processes=2
    ).succeeded()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "breakdown-rank1.json",
        "trace-rank1.json.gz",
    ]
