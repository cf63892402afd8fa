"""Overlapped tensor parallel communication is rejected where it can't work."""

from dataclasses import replace
from typing import Any

import pytest

from s2train.environment.hardware import gpu_rates
from s2train.errors import ConfigError
from s2train.planning import check
from s2train.validation import transformer_engine
from tests.validation.test_rejections import GPU, config

OVERLAP = {"parallel__tp_comm_overlap": True, "parallel__sequence_parallel": True, "parallel__tp": 2}
PCIE = replace(GPU, name="NVIDIA L40S", rates=gpu_rates("NVIDIA L40S"))
NVLINK = replace(GPU, name="NVIDIA H200", rates=gpu_rates("NVIDIA H200"))
CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "without sequence parallelism": ({"parallel__sequence_parallel": False}, GPU, "parallel.sequence_parallel=true"),
    "transformer-engine": ({"layer_backend": "te"}, replace(GPU, capability=(9, 0)), "layer_backend=local fp8=none"),
    "PCIe": ({}, PCIE, "parallel.tp_comm_overlap=false"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_rejected_with_a_remedy(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "te_problem", lambda: None)
    changes, hardware, remedy = CASES[case]
    with pytest.raises(ConfigError) as rejection:
        check(config(**{**OVERLAP, **changes}), 2, hardware)
    assert rejection.value.setting == "parallel.tp_comm_overlap"
    assert remedy in rejection.value.remedy


def test_gpus_with_nvlink_and_unknown_ones_take_it() -> None:
    assert check(config(**OVERLAP), 2, NVLINK).fits
    assert check(config(**OVERLAP), 2, GPU).fits


@pytest.mark.parametrize(("tp", "gpus", "problem"), [(4, 6, "machines of 6 GPUs"), (2, 1, "machines of 1 GPU ")])
def test_groups_of_ranks_across_machines_are_rejected(tp: int, gpus: int, problem: str) -> None:
    machine = replace(NVLINK, per_machine=gpus)
    with pytest.raises(ConfigError, match=problem) as rejection:
        check(config(**{**OVERLAP, "parallel__tp": tp}), 8, machine)
    assert rejection.value.setting == "parallel.tp_comm_overlap"
    assert f"=false, or parallel.tp to a divisor of {gpus}" in rejection.value.remedy


def test_whole_groups_on_each_machine_and_a_group_on_part_of_one_take_it() -> None:
    four = {**OVERLAP, "parallel__tp": 4}
    assert check(config(**four), 16, replace(NVLINK, per_machine=4)).fits
    assert check(config(**four), 4, replace(NVLINK, per_machine=6)).fits


def test_one_tensor_parallel_rank_takes_it_anywhere() -> None:
    assert check(config(parallel__tp_comm_overlap=True), 1, PCIE).fits
