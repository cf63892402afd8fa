"""A machine whose GPUs are lost is distinguished from one without GPUs."""

import threading
from pathlib import Path

import pytest
import torch

from s2train.environment import hardware
from s2train.environment.hardware import check_gpus, without_driver
from s2train.errors import ConfigError
from tests.program import SMALL, error_line, run

VARIABLES = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """CUDA sees none, and nothing indicates one; returns the device file that would."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    return tmp_path / "nvidia0"


def test_a_machine_without_gpus_trains_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpus()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    check_gpus()


def test_a_gpu_is_seen_without_the_driver(no_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    with without_driver():
        assert not torch.cuda.is_available()
    no_gpu.touch()
    with without_driver():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("given", [{"SLURM_GPUS_ON_NODE": "8"}, {"SLURM_JOB_GPUS": "0"}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_gpus_that_cuda_does_not_see_are_rejected(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ConfigError, match=r'sees no GPU \(torch is built for CUDA 12.8\).*driver.*DEVICES=""'):
        check_gpus()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"this torch is built without CUDA"):
        check_gpus()


@pytest.mark.parametrize("name", ["nvidia0", "nvidia3"])  # a container may have any of a machine's GPUs
def test_a_device_file_is_a_sign_of_gpus_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    check_gpus()
    (tmp_path / name).touch()
    with pytest.raises(
        ConfigError, match=rf"^CUDA_VISIBLE_DEVICES=\(not set\): .*{name} exists, but torch sees no GPU"
    ):
        check_gpus()


@pytest.mark.parametrize("none", ["", "-1"])
def test_the_cpu_may_be_wished_for(none: str, no_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu.touch()
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
    check_gpus()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the program itself looks for GPUs")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_lost_its_gpus_is_rejected_before_anything_is_built(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    done = run("pretrain.py", *SMALL, f"run_dir={tmp_path / 'run'}", processes=processes)
    assert done.status != 0
    assert "SLURM_GPUS_ON_NODE=8, but torch sees no GPU" in error_line(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("dtype", "products"), [(None, 0), (torch.bfloat16, 1)])
def test_a_device_is_opened_with_or_without_cublas(
    dtype: torch.dtype | None, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.dtype] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    monkeypatch.setattr(torch, "mm", lambda x, y: made.append(x.dtype))
    hardware.open_device(dtype)
    for thread in threading.enumerate():
        if thread.name == "CUDA context":
            thread.join(10)
    assert made == [dtype] * products
