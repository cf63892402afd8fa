"""launch/long_steps.py measures each stack, and resumes after an interruption."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from s2train.comparison import long_steps, stacks
from s2train.comparison.long_steps import Request, Row, case_overrides, choose_layers, measure_all
from s2train.comparison.long_steps_report import best_dense, gain
from s2train.comparison.stacks import Stack, stacks_to_compare
from s2train.environment.hardware import Hardware, gpu_rates
from s2train.environment.provenance import environment
from s2train.errors import ConfigError
from s2train.planning import compose_run
from tests.program import run

H100 = Hardware("NVIDIA H100 80GB HBM3", "cuda", 85_017_624_576, gpu_rates("NVIDIA H100 80GB HBM3"), (9, 0))
SMALL = ["--size", "tiny", "--layers", "4", "--tokens", "512", "--steps", "1", "--warmup", "1"]
BOTH = ("DSSS", "D1S7")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FlashAttention-4 and Liger-Kernel are installed, transformer-engine is not."""
    monkeypatch.setattr(stacks, "installed_version", lambda _: "1")
    monkeypatch.setattr(stacks, "te_problem", lambda: "transformer-engine is not installed")
    return monkeypatch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="names what a CPU compares")
def test_measures_what_is_missing_and_saves_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "long.json"  # or without the suffix
    arguments = [str(output), "--lengths", "256", *SMALL, f"run_dir={tmp_path / 'run'}"]
    run("long_steps.py", *arguments, processes=0).succeeded()
    content = json.loads((tmp_path / "long.json").read_text())
    assert [(row["way"], row["seq_length"], row["layers"]) for row in content["rows"]] == [
        ("hybrid DSSS", 256, 4),
        ("dense", 256, 4),
    ]
    assert content["command"].endswith(f"{output} --lengths 256 {' '.join([*SMALL, f'run_dir={tmp_path}/run'])}")
    for row in content["rows"]:
        assert row["tokens_per_s"] == pytest.approx(512 / row["step_s"])
    assert content["rows"][0]["stack"] == "layout.layers=DSSS"
    assert content["rows"][0]["kernels"] == [
        "sparse attention: forward torch (no CUDA device), backward torch (no CUDA device)"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.json", "long.png"]

    content["rows"] = content["rows"][:1]
    (tmp_path / "long.json").write_text(json.dumps(content))
    again = run("long_steps.py", *arguments, processes=0).succeeded()
    assert "hybrid DSSS, 256 tokens" not in again.out
    assert "measured: dense, 256 tokens" in again.out
    now = json.loads((tmp_path / "long.json").read_text())
    assert now["rows"][0] == content["rows"][0]
    assert now["earlier_commands"] == [content["command"]]


REQUEST = Request("tiny", [256], 512, None, 1, 1, [])
DENSE, MADE_BY = Stack("dense", "dense", ()), {"command": "earlier", **environment()}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """An output that has a dense row of REQUEST, of eight layers."""
    row = Row("dense", 256, 8, "mlp", 2, 1, 1.0, 1.0, 512.0, 1.0, None, 0.0, 0.0)
    content = {**MADE_BY, "request": asdict(REQUEST), "rows": [asdict(row)]}
    (tmp_path / "long.json").write_text(json.dumps(content))
    return tmp_path / "long"


@pytest.mark.parametrize("other", [{"size": "125m"}, {"tokens": 256}, {"overrides": ["seed=1"]}, {"layers": 4}])
def test_results_of_another_request_are_rejected(other: dict[str, Any], measured: Path) -> None:
    with pytest.raises(ConfigError, match=f"has results with another {next(iter(other))}"):
        measure_all(replace(REQUEST, **other), [DENSE], measured, [], MADE_BY, print)


def test_results_of_another_device_are_rejected(measured: Path) -> None:
    with pytest.raises(ConfigError, match="has results with another device"):
        measure_all(REQUEST, [DENSE], measured, [], {**MADE_BY, "device": "another"}, print)


@pytest.mark.parametrize("content", ["", "[]"])
def test_a_file_of_something_else_is_rejected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^output={path}: holds no results of this program \(.*Name another file"):
        measure_all(REQUEST, [DENSE], tmp_path / "long", [], MADE_BY, print)


def test_further_stacks_get_the_layers_of_those_measured_at_a_length(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tasks(command: object, tasks: list[dict[str, Any]], *_: object) -> list[dict[str, str]]:
        (task,) = tasks
        assert {"model.num_layers=8", "train.recompute=mlp"} <= set(task["overrides"])
        return [{"error": "not run"}]

    monkeypatch.setattr(long_steps, "run_tasks", run_tasks)
    request = replace(REQUEST, layouts=["D1S7"])
    (row,) = measure_all(request, [DENSE, Stack("hybrid D1S7", "hybrid", ())], measured, [], MADE_BY, print)
    assert row.layers == 8


def test_a_stack_that_fails_is_logged_and_left_out(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "long"), "--lengths", "256", *SMALL, "layer_backend=te"]
    done = run("long_steps.py", *arguments, processes=0)
    assert done.status == 2
    assert "failed: hybrid DSSS: ConfigError: layer_backend=te" in done.out
    assert not (tmp_path / "long.json").exists()


def test_an_unknown_stack_is_rejected_with_the_known_ones(tmp_path: Path) -> None:
    done = run("long_steps.py", str(tmp_path / "long"), "--variants", "dense cuDNN 2", *SMALL, processes=0)
    assert done.status == 2
    assert "--variants=dense cuDNN 2: unknown or unavailable here" in done.err
    assert "hybrid DSSS" in done.err


@pytest.mark.parametrize("option", ["--lengths=0", "--tokens=0", "--layers=0", "--steps=0", "--warmup=-1"])
def test_a_number_that_cannot_work_is_rejected(option: str, tmp_path: Path) -> None:
    outcome = run("long_steps.py", str(tmp_path / "long"), option, processes=0)
    assert outcome.status == 2
    assert f"error: {option}: is too small. Set " in outcome.err


def test_the_earlier_name_of_an_option_is_accepted_with_a_warning(tmp_path: Path) -> None:
    done = run("long_steps.py", str(tmp_path / "long"), "--ways", "dense cuDNN 2", *SMALL, processes=0)
    assert "warning: --ways is now --variants\n" in done.err
    assert "--variants=dense cuDNN 2" in done.err


@pytest.mark.usefixtures("libraries")
def test_every_stack_has_the_largest_number_of_layers_that_fits_all() -> None:
    request = Request("7b", (8192, 131072), 131072, None, 1, 1, ["model.vocab_size=8192"], BOTH)
    compared = stacks_to_compare(H100, BOTH)
    short, long = (choose_layers(request, compared, length, H100) for length in (8192, 131072))
    assert short[0] % 8 == long[0] % 8 == 0  # whole repetitions of D1S7
    assert short[0] >= long[0] > 0
    assert (short[1], long[1]) == ("none", "full")


@pytest.mark.usefixtures("libraries")
def test_attention_is_kept_where_a_few_layers_fit_with_their_mlp_recomputed() -> None:
    request = Request("7b", (131072,), 131072, None, 1, 1, ["model.vocab_size=8192"])
    compared = stacks_to_compare(H100, request.layouts)
    assert choose_layers(request, compared, 131072, H100) == (4, "mlp")


@pytest.mark.parametrize(
    ("layouts", "problem"),
    [
        (["DSSS", "DX"], "--layouts=DX: unknown letter X"),
        (["D1S39"], "--layouts=D1S39: stands for 40 layers, which doesn't divide the model's 32"),
    ],
)
def test_a_layout_of_no_number_of_layers_is_rejected(layouts: list[str], problem: str) -> None:
    request = Request("7b", (8192,), 131072, None, 1, 1, [], layouts)
    with pytest.raises(ConfigError, match=f"^{problem}"):
        choose_layers(request, [], 8192, H100)


@pytest.mark.usefixtures("libraries")
def test_stacks_differ_only_in_layout_and_dense_kernels() -> None:
    compared = {stack.name: stack for stack in stacks_to_compare(H100, BOTH)}
    assert list(compared) == [
        *("hybrid DSSS", "hybrid D1S7"),
        *("dense FlashAttention-4", "dense cuDNN", "dense FlashAttention-2"),
    ]
    cfgs = {n: compose_run(case_overrides("7b", stack, 8192, 131072, 8, "none")) for n, stack in compared.items()}
    assert [cfg.dense_attention for cfg in cfgs.values()] == ["fa4", "fa4", "fa4", "cudnn", "flash"]
    assert {(cfg.layer_backend, cfg.elementwise, cfg.loss) for cfg in cfgs.values()} == {("local", "liger", "liger")}
    assert [cfgs[f"hybrid {letters}"].layout.layers for letters in BOTH] == list(BOTH)
    cfgs["dense cuDNN"].dense_attention = "flash"
    assert cfgs["dense cuDNN"] == cfgs["dense FlashAttention-2"]
    assert cfgs["hybrid DSSS"].train.global_batch_size * 8192 == 131072


def test_stacks_depend_on_the_installed_libraries(libraries: pytest.MonkeyPatch) -> None:
    libraries.setattr(stacks, "te_problem", lambda: None)
    names = [stack.name for stack in stacks_to_compare(H100, ["DSSS"])]
    assert names[-4:] == [
        *("hybrid DSSS, TE", "dense FlashAttention-4, TE"),
        *("hybrid DSSS, TE FP8", "dense FlashAttention-4, TE FP8"),
    ]
    libraries.setattr(stacks, "installed_version", lambda _: None)
    without: Stack = stacks_to_compare(H100, ["DSSS"])[1]
    assert without.name == "dense s2train"
    assert {"dense_attention=s2train", "elementwise=torch", "loss=torch"} <= set(without.settings)


def test_a_hybrids_speedup_is_over_the_fastest_dense_stack_of_its_length() -> None:
    row = Row("hybrid DSSS", 8, 4, "none", 1, 3, 1.0, 1.0, 8.0, 1.0, None, 0.0, 0.0)
    slow, fast = replace(row, way="dense cuDNN", step_s=3.0), replace(row, way="dense FlashAttention-4", step_s=2.5)
    other = replace(row, way="dense cuDNN", seq_length=16, step_s=1.5)
    assert best_dense([row, slow, fast, other], 8) == fast
    assert gain(row, fast) == 2.5
    assert gain(row, best_dense([row, other], 8)) is None
    assert gain(slow, fast) is None
