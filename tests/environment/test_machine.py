"""What the machine has, and whose apex it is."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from s2train.environment import hardware
from s2train.environment.apex import apex_available
from s2train.environment.hardware import Hardware, detect, gpu_rates
from s2train.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_flops_by_name(name: str, bf16: float | None) -> None:
    assert Hardware(name, "cuda", 0, gpu_rates(name)).peak_flops("bf16") == bf16


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_ranks_on_a_cpu_share_its_memory() -> None:
    one, two = detect(), detect(1, 2)
    assert one.kind == two.kind == "cpu"
    assert two.memory == one.memory // 2
    assert one.memory <= psutil.virtual_memory().total
    assert one.peak_flops("fp32") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named_and_not_shared() -> None:
    found = detect()
    assert found.name == torch.cuda.get_device_name(0)
    assert found.memory == torch.cuda.mem_get_info(0)[1]
    with pytest.raises(ConfigError, match="--nproc-per-node"):
        detect(0, torch.cuda.device_count() + 1)


@pytest.mark.parametrize(("ranks", "of_machine", "known"), [("1", None, 1), ("16", "8", 8), ("16", None, None)])
def test_ranks_of_a_machine_are_unknown_if_their_launcher_does_not_say(
    ranks: str, of_machine: str | None, known: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "detect", lambda _, local: Hardware("GPU", "cuda", 0, per_machine=local))
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_machine is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_machine)
    assert hardware.detect_own().per_machine == known


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def add(site: Path, *files: str) -> None:
    for name in files:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise AssertionError('imported')\n")


def test_another_package_named_apex_is_rejected_and_not_imported(site: Path) -> None:
    add(site, "apex/__init__.py", "apex/models.py")
    with pytest.raises(ConfigError, match="pip uninstall apex") as rejection:
        apex_available()
    assert rejection.value.value == str(site / "apex")
    assert "apex" not in sys.modules


def test_a_single_module_named_apex_is_rejected(site: Path) -> None:
    add(site, "apex.py")
    with pytest.raises(ConfigError, match="not NVIDIA's"):
        apex_available()


def test_nvidias_apex_without_extensions_is_rejected(site: Path) -> None:
    add(site, "apex/__init__.py", "apex/optimizers/fused_adam.py")
    with pytest.raises(ConfigError, match="amp_C"):
        apex_available()


def test_nvidias_apex_is_found_and_not_imported(site: Path) -> None:
    add(site, "apex/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py")
    assert apex_available()
    assert "apex" not in sys.modules


def test_no_apex_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "Path" in repr(finder)])
    assert not apex_available()
