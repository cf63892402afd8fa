"""Where communication has to start in the order of calls, GPUs get one hardware queue."""

import os
from pathlib import Path

import pytest
import torch

from s2train.config import ParallelConfig
from s2train.environment import hardware
from s2train.environment.hardware_queues import COPIES, order_communication, queues

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
TP, CP, DP = ParallelConfig(tp=2), ParallelConfig(cp=2), ParallelConfig()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file by which this machine has a GPU; the variables and CUDA_VISIBLE_DEVICES aren't set."""
    for name in (NAME, COPIES, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # so that what a test sets is removed
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    file = tmp_path / "nvidia0"
    file.touch()
    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    return file


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("parallel", [TP, CP])
def test_communicating_ranks_get_one_queue(parallel: ParallelConfig) -> None:
    assert order_communication(parallel) is None
    assert os.environ[NAME] == "1"
    assert queues() == f"{NAME}=1"


@pytest.mark.usefixtures("gpu")
def test_copies_between_ranks_keep_several_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = ParallelConfig(tp=2, tp_comm_overlap=True)
    order_communication(overlap)
    assert queues() == f"{NAME}=1 {COPIES}=8"
    monkeypatch.setenv(COPIES, "2")
    order_communication(overlap)
    assert os.environ[COPIES] == "2"


@pytest.mark.usefixtures("gpu")
def test_data_parallel_runs_keep_cudas_default() -> None:
    assert order_communication(DP) is None
    assert NAME not in os.environ
    assert queues() is None


def test_runs_without_a_gpu_keep_it_too(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as hidden:
        hidden.setenv("CUDA_VISIBLE_DEVICES", "")
        order_communication(TP)
    gpu.unlink()
    order_communication(TP)
    assert NAME not in os.environ


@pytest.mark.usefixtures("gpu")
def test_the_users_value_is_kept_and_its_cost_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "8")
    lost = order_communication(TP)
    assert lost is not None
    assert f"{NAME}=8 is kept" in lost
    assert os.environ[NAME] == "8"
    assert order_communication(CP) is None
