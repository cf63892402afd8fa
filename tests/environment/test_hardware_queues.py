"""Where communication has to start in the order of calls, GPUs get one hardware queue."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2train.config import ParallelConfig
from s2train.environment import hardware, hardware_queues
from s2train.environment.hardware_queues import gpu_capabilities, order_communication, queues

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
TP, CP, DP = ParallelConfig(tp=2), ParallelConfig(cp=2), ParallelConfig()
Machine = Callable[..., None]


class Library:
    """NVIDIA's management library on a machine with such GPUs."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlShutdown(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.capabilities)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self.capabilities[device.value - 1]
        return 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes this a machine with such GPUs, on which the variable and CUDA_VISIBLE_DEVICES aren't set."""

    def make(*capabilities: tuple[int, int]) -> None:
        for name in (NAME, "CUDA_VISIBLE_DEVICES"):
            monkeypatch.setenv(name, "")  # so that what a test sets is removed
            monkeypatch.delenv(name)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Library(*capabilities))

    return make


@pytest.mark.parametrize("parallel", [TP, CP])
def test_communicating_ranks_get_one_queue_before_blackwell(machine: Machine, parallel: ParallelConfig) -> None:
    machine((9, 0), (9, 0))
    assert order_communication(parallel) is None
    assert os.environ[NAME] == "1"
    assert queues() == f"{NAME}=1"


@pytest.mark.parametrize(("parallel", "capability"), [(DP, (9, 0)), (TP, (10, 0)), (TP, (12, 0))])
def test_other_runs_and_blackwell_keep_cudas_default(
    machine: Machine, parallel: ParallelConfig, capability: tuple[int, int]
) -> None:
    machine(capability)
    assert order_communication(parallel) is None
    assert NAME not in os.environ
    assert queues() is None


def test_hidden_gpus_get_none(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    order_communication(TP)
    assert NAME not in os.environ


def test_a_gpu_of_unknown_capability_gets_one_queue_and_a_cpu_none(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    machine()
    monkeypatch.setattr(hardware, "_GPU_FILE", tmp_path / "nvidia0")
    order_communication(TP)
    assert NAME not in os.environ
    (tmp_path / "nvidia0").touch()
    order_communication(TP)
    assert os.environ[NAME] == "1"


def test_the_users_value_is_kept_and_its_cost_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    monkeypatch.setenv(NAME, "8")
    lost = order_communication(TP)
    assert lost is not None
    assert f"{NAME}=8 is kept" in lost
    assert os.environ[NAME] == "8"
    assert order_communication(CP) is None


def test_a_machine_without_the_library_has_no_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware_queues, "_LIBRARY", "no-such-library.so")
    assert gpu_capabilities() == []
