"""A run starts from the weights of another alone, and trains the weights that attention adds with the trunk frozen."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from s2train.costs.phases import mean_flops
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, format_plan
from tests.program import SMALL, UNSAVED, error_line, metrics, pretrain

CPU = Hardware("CPU", "cpu", 1 << 36, None)
SELECTED = [
    "layout.layers=DEEE",
    "+layout.kinds.E={kind:block_selection,scorer:index,top_k:1,warm_up_steps:2}",
    "train.freeze_trunk_steps=2",
    "train.steps=4",
    "checkpoint.interval=2",
]


def model_of(run_dir: Path, step: int) -> dict[str, Tensor]:
    """All weights of a checkpoint by name, without optimizer state."""
    checkpoint = run_dir / "checkpoints" / f"iter_{step:07}"
    with TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(str(checkpoint), str(whole))
        found = torch.load(whole, weights_only=False)
    return {n: x for n, x in found.items() if n.startswith(("decoder", "embedding")) and isinstance(x, Tensor)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    pretrain(folder, "layout.layers=D", "train.steps=3").succeeded()
    return folder


@pytest.fixture(scope="module")
def selected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selected")
    pretrain(folder, *SELECTED, f"checkpoint.resume={dense}", "checkpoint.weights_only=true").succeeded()
    return folder


@pytest.mark.slow
def test_a_sparse_model_starts_at_step_1_from_a_dense_models_weights(dense: Path, selected: Path) -> None:
    first = metrics(selected)[0]
    assert first["step"] == 1
    assert first["loss"] < metrics(dense)[0]["loss"] - 0.05


@pytest.mark.slow
def test_the_first_step_of_the_warm_up_is_the_dense_models(dense: Path, selected: Path, tmp_path: Path) -> None:
    start = [f"checkpoint.resume={dense}", "checkpoint.weights_only=true", "train.steps=4", "train.exit_step=1"]
    pretrain(tmp_path, "layout.layers=D", *start, UNSAVED).succeeded()
    assert metrics(selected)[0]["loss"] == pytest.approx(metrics(tmp_path)[0]["loss"], rel=1e-6)


@pytest.mark.slow
def test_a_frozen_trunk_keeps_its_bits_while_the_scorer_learns(dense: Path, selected: Path) -> None:
    before, frozen, after = model_of(dense, 3), model_of(selected, 2), model_of(selected, 4)
    assert before.keys() < frozen.keys()
    assert all(torch.equal(before[name], frozen[name]) for name in before)
    assert not any(torch.equal(frozen[name], after[name]) for name in frozen)
    (at_first,) = [value for name, value in frozen.items() if name.endswith("layer_1.index_key")]
    assert float(at_first.std()) == pytest.approx(16**-0.5, rel=0.2)


@pytest.mark.slow
def test_the_learning_rate_rises_again_from_0_after_the_frozen_steps(selected: Path) -> None:
    frozen, thawed, later = (metrics(selected)[step - 1]["lr"] for step in (2, 3, 4))
    assert frozen > later > thawed == 0


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_from_within_the_frozen_steps(dense: Path, selected: Path, tmp_path: Path) -> None:
    start = [f"checkpoint.resume={dense}", "checkpoint.weights_only=true", "checkpoint.interval=1"]
    logged = (f"new run in {tmp_path}, with the weights of {dense}/", f"resuming from {tmp_path}/")
    for stop, origin in zip((["train.exit_step=1"], []), logged, strict=True):
        done = pretrain(tmp_path, *SELECTED, *start, *stop).succeeded()
        assert origin in done.out
        assert ("initial values of index_query, index_key in 3 layers" in done.out) == bool(stop)
    whole, parts = model_of(selected, 4), model_of(tmp_path, 4)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_a_trunk_that_was_trained_is_not_frozen(selected: Path, tmp_path: Path) -> None:
    settings = [*SELECTED, "train.steps=10", "train.freeze_trunk_steps=8", f"checkpoint.resume={selected}"]
    line = error_line(pretrain(tmp_path, *settings))
    assert "train.freeze_trunk_steps=8: " in line
    assert "is at step 4" in line
    assert "checkpoint.weights_only=true" in line


@pytest.mark.slow
def test_weights_of_another_shape_are_rejected(dense: Path, tmp_path: Path) -> None:
    settings = [*SELECTED, "model.num_query_groups=4", f"checkpoint.resume={dense}", "checkpoint.weights_only=true"]
    assert "model.num_query_groups=4: " in error_line(pretrain(tmp_path, *settings))


@pytest.mark.slow
def test_weights_of_a_scorer_of_another_size_are_rejected(selected: Path, tmp_path: Path) -> None:
    settings = [*SELECTED, "+layout.kinds.E.index_dim=8", f"checkpoint.resume={selected}"]
    line = error_line(pretrain(tmp_path, *settings, "checkpoint.weights_only=true"))
    assert "layout.kinds.E.index_dim=8: the weight index_query of layer 1 is " in line


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["checkpoint.weights_only=true"], "checkpoint.weights_only=true: checkpoint.resume=auto names no run"),
        (
            ["checkpoint.weights_only=true", "checkpoint.resume=runs/x", "checkpoint.new_data=true"],
            "checkpoint.weights_only=true: checkpoint.new_data=true takes",
        ),
        (["train.freeze_trunk_steps=3"], "train.freeze_trunk_steps=3: no layer's kind of attention adds weights"),
        (["train.freeze_trunk_steps=-1"], "train.freeze_trunk_steps=-1"),
        (["optim.trunk_warmup_steps=2"], "optim.trunk_warmup_steps=2: no trunk is frozen before it"),
        (
            [*SELECTED, "optim.trunk_warmup_steps=3"],
            "optim.trunk_warmup_steps=3: the warm-up after train.freeze_trunk_steps=2 would end at step 5, after",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_rejected(settings: list[str], error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(compose_run([*SMALL, *settings]), 1, CPU)
    assert str(raised.value).startswith(error)


def test_the_plan_says_what_each_phase_costs() -> None:
    cfg = compose_run([*SMALL, *SELECTED, "train.freeze_trunk_steps=1", "optim.warmup_steps=1"])
    plan = check(cfg, 1, CPU)
    assert [(phase.first, phase.last, phase.is_trunk_frozen) for phase in plan.phases] == [
        (1, 1, True),
        (2, 2, False),
        (3, 4, False),
    ]
    first, second, last = plan.phases
    assert first.flops == second.flops > last.flops == plan.flops.sparse
    lines = format_plan(plan)
    assert "phases        steps 1 to 1: " in lines
    assert "; index block-selection attention warms up; trunk frozen" in lines
    again = "; the learning rate warms up again, over 1 steps (optim.trunk_warmup_steps)"
    assert [line.startswith("              steps 2 to 2: ") for line in lines.splitlines() if again in line] == [True]


def test_flops_of_steps_are_those_of_the_phases_that_they_lie_in() -> None:
    plan = check(compose_run([*SMALL, *SELECTED, "train.freeze_trunk_steps=1", "optim.warmup_steps=1"]), 1, CPU)
    _, second, last = plan.phases
    assert mean_flops(plan.phases, 1, 2) == second.flops
    assert mean_flops(plan.phases, 2, 4) == pytest.approx((second.flops + 2 * last.flops) / 3)
    assert mean_flops(plan.phases, 4, 4) == last.flops


def test_a_plan_without_phases_prints_none() -> None:
    assert "phases" not in format_plan(check(compose_run(SMALL), 1, CPU))


@pytest.mark.slow
def test_a_new_start_from_weights_scales_rope_and_logs_it(dense: Path, tmp_path: Path) -> None:
    start = [f"checkpoint.resume={dense}", "checkpoint.weights_only=true", "layout.layers=D", "train.steps=3"]
    start += ["model.rope_scaling={kind:linear,factor:4}", "train.exit_step=1"]
    done = pretrain(tmp_path, *start, processes=0).succeeded()
    assert "model.rope_scaling.kind none → linear" in done.out
    assert metrics(tmp_path)[0]["loss"] < metrics(dense)[0]["loss"] - 0.05
