"""`launch/scaling.py` runs on processes of the CPU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.errors import ConfigError
from s2train.scaling.options import devices
from s2train.scaling.parity import STEPS, VARIANTS
from tests.program import error_line, run

TINY = [
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.vocab_size=272",
    "train.precision=bf16",
    "tracking.wandb=disabled",
    "data.num_workers=0",
]


def measure(folder: Path, *options: str, timeout: int = 600) -> dict[str, Any]:
    """The parts of the results."""
    run("scaling.py", "results", *options, *TINY, processes=0, cwd=folder, timeout=timeout).succeeded()
    parts: dict[str, Any] = json.loads((folder / "results.json").read_text())["parts"]
    return parts


def test_existing_results_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text("{}")
    done = run("scaling.py", "two.json", "--parity", processes=0, cwd=tmp_path)  # the suffix is not added twice
    assert done.status == 2
    assert "two.json exists" in error_line(done)


def test_a_number_of_gpus_without_divisions_is_rejected(tmp_path: Path) -> None:
    done = run("scaling.py", "three", "--parity", "--gpus", "3", processes=0, cwd=tmp_path)
    assert done.status == 2
    assert "--gpus=3: no divisions are known for it. Choose from [2, 4, 8]" in error_line(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--parity-at-once", "0"], "--parity-at-once=0: is no positive number"),
        (["--long", "--long-lengths", "8k", "0"], "--long-lengths=0: is no positive number"),
        (["--timeout", "inf"], "--timeout=inf: is no positive number"),
        (["--timeout", "1e9"], "--timeout=1000000000.0: is too large. Set at most 1000000"),
        (["--cp-bytes", "--attention-length", "1k", "--gpus", "8"], "--attention-length=1024: 8 ranks don't each"),
        (["--balance", "--attention-length", "1k"], "--attention-length=1024: 8 ranks don't each"),
        (["--scaling", "parallel.pp=2"], "parallel.pp=2: runs of --scaling need its default"),
        (["--long-size", "8b"], "--long-size=8b_hybrid: unknown model"),
        (["--divisions", "cp4"], "--divisions=cp4: unknown division of 2 GPUs. There are one, dp2, cp2, tp2"),
        (["--micro-batch", "4"], "--micro-batch=4: doesn't divide --sequences=2"),
        (["--models", "1b_hybrid", "1b_hybird"], "--models=1b_hybird: unknown model"),
    ],
)
def test_an_option_that_cannot_work_is_rejected(tmp_path: Path, options: list[str], line: str) -> None:
    done = run("scaling.py", "two", *options, processes=0, cwd=tmp_path)
    assert done.status == 2
    assert line in error_line(done)
    assert not list(tmp_path.iterdir())


def test_fewer_visible_gpus_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^--gpus=4: torch sees 2 GPU\(s\) on this machine\. .*CUDA_VISIBLE_DEVICES"):
        devices(4)


def test_an_option_that_no_part_reads_is_named_and_nothing_is_left_of_a_rejected_request(tmp_path: Path) -> None:
    options = ["--long", "--long-size", "tiny", "--long-lengths", "1k", "--seq-length", "8k", "--long-layers", "3"]
    done = run("scaling.py", "two", *options, processes=0, cwd=tmp_path)
    assert "warning: --seq-length has no effect without --scaling" in done.err
    assert error_line(done).startswith("error: layout.layers=DSSS")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_failed_runs_are_recorded_and_the_program_fails(tmp_path: Path) -> None:
    options = ["--scaling", "--models", "tiny_dense", "optim.lr=-1"]
    done = run("scaling.py", "two", *options, processes=0, cwd=tmp_path)
    assert done.status == 1
    assert "runs of scaling failed; the same command repeats them" in done.err
    assert "Warning" not in done.err
    rows = json.loads((tmp_path / "two.json").read_text())["parts"]["scaling"]["models"]["tiny_dense"]
    assert all("optim.lr=-1" in row["error"] for row in rows.values())


@pytest.mark.slow
def test_an_interrupted_measurement_resumes_on_another_machine(tmp_path: Path) -> None:
    """Speed of two processes, without a checkpoint; then with the results' two files alone."""
    options = ["--models", "tiny_hybrid", "--seq-length", "128", "train.seq_length=128"]
    first = measure(tmp_path, "--scaling", *options)["scaling"]
    rows = first["models"]["tiny_hybrid"]
    assert rows.keys() == {"one", "dp2", "cp2", "tp2"}
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    assert not list(tmp_path.glob("runs/**/checkpoints"))
    shutil.rmtree(tmp_path / "runs")
    content = json.loads((tmp_path / "results.json").read_text())
    content["parts"]["scaling"]["unfinished"] = True
    (tmp_path / "results.json").write_text(json.dumps(content))
    jobs = json.loads((tmp_path / "results.jobs.json").read_text())
    del jobs["tiny_hybrid cp2"]
    (tmp_path / "results.jobs.json").write_text(json.dumps(jobs))
    again = measure(tmp_path, "--scaling", *options, "--launcher", "torchrun")["scaling"]
    assert [path.name for path in tmp_path.glob("runs/*/*.log")] == ["tiny_hybrid-cp2.log"]
    assert "unfinished" not in again
    assert again["models"]["tiny_hybrid"].keys() == rows.keys()
    assert again["models"]["tiny_hybrid"]["tp2"] == rows["tp2"]
    other = run("scaling.py", "results", "--scaling", "--seq-length", "256", processes=0, cwd=tmp_path)
    assert "results.json exists" in error_line(other)


@pytest.mark.long
def test_every_parallelism_agrees_with_one_process(tmp_path: Path) -> None:
    model = ["--parity-model", "tiny_hybrid", "--attention-length", "512", "train.seq_length=128"]
    result = measure(tmp_path, "--parity", "--parity-at-once", "2", *model, timeout=1200)["parity"]
    assert result["errors"] == {}
    assert result["deviation"].keys() == VARIANTS[2].keys()
    assert {len(result["losses"][name]) for name in ("one", *VARIANTS[2])} == {STEPS}
    assert result["agrees"], result["deviation"]


@pytest.mark.long
def test_a_resumed_run_equals_an_uninterrupted_one_also_over_fewer_processes(tmp_path: Path) -> None:
    options = ["--gpus", "4", "--parity-model", "tiny_hybrid", "train.seq_length=128"]
    resumed = measure(tmp_path, "--resume", *options)["resume"]
    assert (resumed["processes"], resumed["fewer"]["processes"]) == (4, [4, 2, 4])
    for result in (resumed, resumed["fewer"]):
        assert (result["errors"], result["different_steps"], result["different_values"]) == ({}, [], [])
        assert result["saved_values"] > 40
        assert result["agrees"]


@pytest.mark.long
def test_long_steps_of_four_processes_have_the_losses_of_two(tmp_path: Path) -> None:
    options = ["--long-size", "tiny", "--long-lengths", "512", "1k", "--long-agreement", "512"]
    result = measure(tmp_path, "--long", "--gpus", "4", *options)["long"]
    assert result["agreement"]["deviation"].keys() == {"cp4"}
    assert result["agreement"]["agrees"], result["agreement"]
    rows = result["rows"].values()
    assert [(row["model"], row["seq_length"], row["layers"]) for row in rows] == [
        ("tiny_hybrid", 512, 4),
        ("tiny_hybrid", 1024, 4),
        ("tiny_dense", 1024, 4),
    ]
    assert all(row["is_finite"] and row["step_time_s"] > 0 for row in rows)
