"""An optimizer that Megatron doesn't have here, or that doesn't go with other settings, is rejected."""

from typing import Any

import pytest

from s2train.config import PretrainConfig
from s2train.costs.memory import offloaded_bytes, optimizer_bytes
from s2train.errors import ConfigError
from s2train.planning import check, compose_run, format_plan
from s2train.validation import optimizers
from s2train.validation.optimizers import check_offload_library, check_optimizer, check_options
from tests.validation.test_rejections import CPU, GPU


def run_of(*settings: str) -> PretrainConfig:
    composed: PretrainConfig = compose_run(["+model=tiny_hybrid", "train.steps=200", *settings])
    return composed


def rejected(cfg: PretrainConfig) -> str:
    def both() -> None:
        check_optimizer(cfg)
        check_options(cfg)
        check_offload_library(cfg)

    with pytest.raises(ConfigError) as raised:
        both()
    return str(raised.value)


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    monkeypatch.setattr(optimizers, "installed_version", lambda name: versions[name.replace("-", "_")])


@pytest.mark.parametrize("name", optimizers.EMERGING)
def test_emerging_optimizers_need_their_package_and_a_megatron_that_has_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_of(f"optim.name={name}", "parallel.distributed_optimizer=false")
    installed(monkeypatch, megatron_core="0.16.1", emerging_optimizers="0.3.0")
    assert rejected(cfg).startswith(f"optim.name={name}: megatron-core 0.16.1 has no {name}. Use Python 3.12")
    installed(monkeypatch, megatron_core="0.19.2", emerging_optimizers=None)
    assert "emerging-optimizers is not installed" in rejected(cfg)
    installed(monkeypatch, megatron_core="0.19.2", emerging_optimizers="0.3.0")
    check_optimizer(cfg)


def test_muon_needs_whole_kv_heads_on_each_rank_to_split_them(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, megatron_core="0.19.2", emerging_optimizers="0.3.0")
    own = ["optim.name=muon", "parallel.distributed_optimizer=false", "model.num_query_groups=2"]
    found = rejected(run_of(*own, "parallel.tp=4"))
    assert found.startswith("parallel.tp=4: muon splits queries, keys and values only on ranks with whole KV heads")
    assert "muon_split_qkv=false" in found
    check_optimizer(run_of(*own, "parallel.tp=2"))
    check_optimizer(run_of(*own, "parallel.tp=4", "+optim.options.muon_split_qkv=false"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.name=sgd"], ["parallel.distributed_optimizer=true", "=false"]),
        (["+optim.options.sgd_momentum=0.5"], ["optim.options.sgd_momentum=0.5", "adam takes none"]),
        (
            ["optim.name=sgd", "parallel.distributed_optimizer=false", "+optim.options.muon_momentum=0.5"],
            ["optim.options.muon_momentum=0.5", "Names begin with sgd_"],
        ),
        (
            ["optim.name=sgd", "parallel.distributed_optimizer=false", "+optim.options.sgd_momentums=0.5"],
            ["optim.options.sgd_momentums=0.5", "has no such setting", "Set one of sgd_momentum."],
        ),
        (
            ["optim.name=sgd", "parallel.distributed_optimizer=false", "+optim.options.sgd_momentum=much"],
            ["optim.options.sgd_momentum=much", "it takes a float", "such as 0.9"],
        ),
        (
            ["optim.name=sgd", "parallel.distributed_optimizer=false", "+optim.options.sgd_momentum=true"],
            ["optim.options.sgd_momentum=true", "it takes a float", "such as 0.9"],
        ),
        *(
            (
                ["optim.name=sgd", "parallel.distributed_optimizer=false", f"+optim.options.sgd_momentum={value}"],
                [f"optim.options.sgd_momentum={value}", "a momentum lies in [0, 1)", "such as 0.9"],
            )
            for value in (-0.5, 1.0, "nan")
        ),
        (["optim.cpu_offload=1.5"], ["optim.cpu_offload=1.5", "0 … 1"]),
        (["optim.cpu_offload=0.5"], ["optim.cpu_offload=0.5", "can't resume it with train.precision=fp32"]),
        (
            ["optim.cpu_offload=0.5", "train.precision=bf16", "parallel.distributed_optimizer=false"],
            ["optim.cpu_offload=0.5", "=true"],
        ),
        (
            ["optim.cpu_offload=0.5", "optim.name=sgd", "parallel.distributed_optimizer=false"],
            ["optim.cpu_offload=0.5", "only adam's"],
        ),
    ],
    ids=lambda value: value[0] if "=" in value[0] else "",
)
def test_what_does_not_go_together_is_rejected(settings: list[str], words: list[str]) -> None:
    found = rejected(run_of(*settings))
    assert all(word in found for word in words), found


def test_there_is_nothing_to_offload_without_a_gpu_and_no_offload_without_transformer_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = run_of("optim.cpu_offload=0.5", "train.precision=bf16")
    with pytest.raises(ConfigError, match=r"optim.cpu_offload=0.5: there is no GPU"):
        check(cfg, 1, CPU)
    installed(monkeypatch, transformer_engine=None)
    assert "where transformer-engine is installed" in rejected(cfg)
    installed(monkeypatch, transformer_engine="2.9")
    check_offload_library(cfg)


def test_a_plan_rejects_an_option_that_the_run_would_reject() -> None:
    cfg = run_of("optim.name=sgd", "parallel.distributed_optimizer=false", "+optim.options.sgd_momentum=much")
    with pytest.raises(ConfigError, match=r"^optim.options.sgd_momentum=much: it takes a float"):
        check(cfg, 1, CPU)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_plan_moves_the_offloaded_share_to_the_host(share: float) -> None:
    def memory(**changes: Any) -> tuple[int, str]:
        settings = [f"{name}={value}" for name, value in changes.items()]
        plan = check(compose_run(["+model=1b_hybrid", *[s.replace("__", ".") for s in settings]]), 4, GPU)
        return plan.memory.optimizer, format_plan(plan)

    whole, text = memory()
    assert "on the host" not in text
    left, text = memory(optim__cpu_offload=share)
    assert left == pytest.approx((1 - share) * whole, abs=2)
    cfg = compose_run(["+model=1b_hybrid", f"optim.cpu_offload={share}"])
    plan = check(cfg, 4, GPU)
    taken = offloaded_bytes(cfg, plan.rank_parameters, 4)
    assert taken == pytest.approx(share * whole * 16 / 12, rel=1e-6)  # and fp32 gradients
    assert f"on the host {taken / 2**30:.3f} GiB" in text


@pytest.mark.parametrize(
    ("name", "precision", "nbytes"),
    [("adam", "bf16", 12), ("adam", "fp32", 8), ("sgd", "bf16", 8), ("sgd", "fp32", 4)],
)
def test_state_is_counted_by_the_optimizers_moments(name: str, precision: str, nbytes: int) -> None:
    assert optimizer_bytes(run_of(f"optim.name={name}", f"train.precision={precision}")) == nbytes
