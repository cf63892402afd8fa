"""Megatron's optimizers besides Adam train, and resume bit for bit."""

from pathlib import Path

import pytest

from s2train.errors import ConfigError
from s2train.planning import compose_run
from s2train.validation.optimizers import check_optimizer
from tests.program import UNSAVED, error_line, metrics, pretrain

pytestmark = [pytest.mark.slow]

OPTIONS = {
    "sgd": ["+optim.options.sgd_momentum=0.8"],
    "muon": ["+optim.options.muon_num_ns_steps=3"],
}


def problem(name: str) -> str | None:
    try:
        check_optimizer(
            compose_run(["+model=tiny_hybrid", f"optim.name={name}", "parallel.distributed_optimizer=false"])
        )
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, precision: str, tmp_path: Path) -> None:
    if reason := problem(name):
        pytest.skip(reason)
    own = [f"optim.name={name}", *OPTIONS[name], "parallel.distributed_optimizer=false", f"train.precision={precision}"]
    own += ["train.steps=4", "optim.warmup_steps=1", "optim.lr=1e-2", "checkpoint.interval=2"]
    whole = pretrain(tmp_path / "whole", *own, processes=0).succeeded()
    assert f"optimizer {name}" in whole.out
    assert f", {OPTIONS[name][0].removeprefix('+optim.options.')} |" in whole.out
    pretrain(
        tmp_path / "parts",
        *own,
        UNSAVED,
        f"checkpoint.resume={tmp_path / 'whole' / 'checkpoints' / 'iter_0000002'}",
        processes=0,
    ).succeeded()

    def trace(folder: str) -> list[tuple[float, float]]:
        return [(record["loss"], record["grad_norm"]) for record in metrics(tmp_path / folder)]

    assert trace("parts") == trace("whole")[2:]
    assert trace("whole")[-1][0] < trace("whole")[0][0]  # it learned
    if name == "sgd" and precision == "fp32":
        changed = [own[0], "+optim.options.sgd_momentum=0.1", *own[2:]]
        resume = f"checkpoint.resume={tmp_path / 'whole' / 'checkpoints' / 'iter_0000002'}"
        pretrain(tmp_path / "momentum", *changed, resume, UNSAVED, processes=0).succeeded()
        assert trace("momentum")[0] == trace("whole")[2]
        assert trace("momentum")[1] != trace("whole")[3]  # the step used the new momentum
        start = f"checkpoint.resume={tmp_path / 'whole'}"
        other = pretrain(
            tmp_path / "other", start, "parallel.distributed_optimizer=false", "train.precision=fp32", processes=0
        )
        assert "holds optimizer state saved with optim.name=sgd" in error_line(other)


def test_muon_trains_on_two_tensor_parallel_ranks_as_on_one(tmp_path: Path) -> None:
    if reason := problem("muon"):
        pytest.skip(reason)
    own = ["optim.name=muon", "+optim.options.muon_fp32_matmul_prec=highest", "parallel.distributed_optimizer=false"]
    own += ["train.steps=4", "optim.warmup_steps=1", "optim.lr=1e-2", "model.qk_norm=true", UNSAVED]
    for tp in (1, 2):
        pretrain(tmp_path / str(tp), *own, f"parallel.tp={tp}", processes=tp).succeeded()
    one, two = (
        [value for record in metrics(tmp_path / str(tp)) for value in (record["loss"], record["grad_norm"])]
        for tp in (1, 2)
    )
    assert two == pytest.approx(one, rel=1e-5)  # of another division, in fp32
