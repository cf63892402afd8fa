"""`plan.device=…` plans for GPUs that are not here."""

from dataclasses import replace

import pytest
from s2train.kernels import dense_choice

from s2train.command_line.composition import expand_shorthand
from s2train.config import PretrainConfig
from s2train.environment import liger
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.needles.config import NeedleConfig
from s2train.planning import asked_plan, compose_run, format_plan, preview, proposal, propose, targets
from s2train.planning.targets import NAMES, planned_for, target_gpu
from s2train.validation import libraries, transformer_engine
from tests.program import error_line, run


def plan_of(*settings: str, processes: int = 1) -> str:
    return format_plan(asked_plan(compose_run(settings), processes))


@pytest.mark.parametrize("name", NAMES)
def test_a_named_gpu_has_its_memory_and_a_predicted_step(name: str) -> None:
    found = target_gpu(name)
    memory = int(name.rpartition("-")[2].removesuffix("gb")) * 1e9
    assert memory * 0.9 < found.memory < memory * 1.1
    text = plan_of("+model=1b_hybrid", f"plan.device={name}")
    assert f"({found.name})" in text
    assert " tokens/s (" in text


def test_a_name_may_leave_the_memory_out_where_one_gpu_has_it() -> None:
    assert target_gpu("H200") == target_gpu("h200-141gb")
    with pytest.raises(ConfigError, match=r"Did you mean plan\.device=a100-40gb or plan.device=a100-80gb"):
        target_gpu("a100")


def test_an_unknown_gpu_is_rejected_with_the_nearest_and_the_others() -> None:
    with pytest.raises(ConfigError, match=r"plan.device=h100-80: .*plan.device=h100-80gb\? There are a100-40gb, "):
        target_gpu("h100-80")


def test_so_many_gpus_as_named_else_as_hold_the_model_once() -> None:
    assert plan_of("+model=7b_hybrid", "plan.device=h100-80gb").startswith("7b_hybrid on 8 processes: tp 8")
    assert plan_of("+model=7b_hybrid", "plan.device=h100-80gb", "plan.count=16").startswith("7b_hybrid on 16 processes")
    assert plan_of("+model=7b_hybrid", "plan.device=h100-80gb", processes=32).startswith("7b_hybrid on 32 processes")


def test_a_count_that_is_no_multiple_of_a_copy_is_rejected() -> None:
    cfg = compose_run(["+model=7b_hybrid", "plan.device=h100-80gb", "plan.count=12"])
    with pytest.raises(ConfigError, match=r"plan.count=12: .* = 8 GPUs. Set plan.count=16"):
        planned_for(cfg, 1)


@pytest.mark.parametrize("settings", [("plan.count=0",), ("plan.count=8", "parallel.tp=0")])
def test_settings_out_of_their_range_are_rejected_before_they_are_divided_by(settings: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{settings[-1]}: must be more than 0"):
        planned_for(compose_run(["+model=7b_hybrid", *settings]), 1)


def test_a_gpu_without_fp8_is_rejected_where_fp8_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"fp8=hybrid: NVIDIA A100.* below 8.9"):
        plan_of("+model=1b_hybrid", "plan.device=a100-80gb", "fp8=hybrid")
    assert "transformer-engine's layers" in plan_of("+model=1b_hybrid", "plan.device=h100-80gb", "fp8=hybrid")


@pytest.mark.parametrize("count", [(), ("plan.count=32",)])
def test_overlap_of_ranks_on_two_machines_is_rejected(count: tuple[str, ...]) -> None:
    division = ("parallel.tp=16", "parallel.sequence_parallel=true")
    cfg = ("+model=7b_hybrid", "plan.device=h100-80gb", *count, *division)
    assert "parallel.tp_comm_overlap=true" not in plan_of(*cfg)  # as advice
    with pytest.raises(ConfigError, match=r"^parallel.tp_comm_overlap=true: .*machines of 8 GPUs .*parallel.tp=16"):
        plan_of(*cfg, "parallel.tp_comm_overlap=true")


def test_other_processes_than_this_jobs_are_planned_on_machines_of_8_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "detect_own", lambda: replace(target_gpu("h100"), per_machine=1))
    cfg = compose_run(["+model=7b_hybrid", "plan=true"])
    assert cfg.parallel.tp == 8
    assert planned_for(cfg, 1)[1].per_machine == 8
    assert planned_for(cfg, 8)[1].per_machine == 1


def test_a_machine_without_a_gpu_names_the_settings_to_plan_for_some() -> None:
    text = format_plan(preview(compose_run(["+model=7b_hybrid"]), 1, Hardware("CPU", "cpu", 16 << 30)))
    assert "(this machine's RAM, no GPU, for each of 8 processes)" in text
    assert "It does not fit this machine, which has no GPU" in text.splitlines()[-1]
    assert "plan.device=a100-40gb" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["layer_backend=te"], "layer_backend=te: transformer-engine is not installed. pip install "),
        (["fp8=hybrid"], "fp8=hybrid: transformer-engine is not installed. pip install "),
        (["loss=liger"], "loss=liger: liger-kernel is not installed. pip install "),
        (["dense_attention=fa4"], "dense_attention=fa4: flash-attn-4 is not installed. pip install "),
    ],
)
@pytest.mark.parametrize("plan", ["plan=true", "plan.gpus=2"])
def test_a_plan_for_this_machine_rejects_what_is_not_installed_here(
    settings: list[str], words: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer_engine, "te_problem", lambda: "transformer-engine is not installed")
    for module in (libraries, liger, dense_choice):
        monkeypatch.setattr(module, "installed_version", lambda package: None)
    for module in (targets, proposal):
        monkeypatch.setattr(module, "detect_own", lambda: target_gpu("h100"))
    cfg = compose_run(["+model=1b_hybrid", *settings, plan])
    with pytest.raises(ConfigError) as rejected:
        propose(cfg) if cfg.plan.gpus else asked_plan(cfg, 1)
    assert str(rejected.value).startswith(words)
    assert str(rejected.value).endswith(". plan.device=h100-80gb plans for another machine.")
    assert "1b_hybrid on 1 process" in plan_of("+model=1b_hybrid", *settings, "plan.device=h100-80gb")


def test_plan_true_can_be_combined_with_a_device() -> None:
    both = compose_run(["plan.device=h100-80gb", "+model=7b_hybrid", "plan=true"]).plan
    assert (both.show, both.device, both.asked) == (True, "h100-80gb", True)
    assert compose_run(["+model=7b_hybrid", "plan=false"]).plan.asked is False
    assert expand_shorthand(["plan=true"], NeedleConfig) == ["plan=true"]
    assert expand_shorthand(["plan={device:h200}", "a.plan=1"], PretrainConfig) == ["plan={device:h200}", "a.plan=1"]


def test_the_program_takes_both_and_starts_nothing() -> None:
    done = run("pretrain.py", "+model=7b_hybrid", "plan=true", "plan.device=h100-80gb", processes=0)
    assert done.status == 0, done.err
    assert "of 79.100 (NVIDIA H100 80GB HBM3)" in done.out
    assert "unknown GPU" in error_line(run("pretrain.py", "+model=7b_hybrid", "plan.device=v100", processes=0))
