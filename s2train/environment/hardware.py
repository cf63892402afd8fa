"""Detects a rank's device, its memory and its peak rates."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import psutil
import torch

from s2train.errors import ConfigError


class GpuRates(NamedTuple):
    """Peak rates of a GPU, from its data sheet.

    Attributes:
        bf16: dense FLOP/s of the tensor cores, with fp32 accumulation.
        fp32: FLOP/s without tensor cores: TF32 is off.
        memory: bytes/s.
        link: bytes/s in one direction to the machine's other GPUs: NVLink, or PCIe without it.
    """

    bf16: float
    fp32: float
    memory: float
    link: float


# By part of the device's name; the first match counts.
_GPUS: tuple[tuple[str, GpuRates], ...] = (
    ("GB200", GpuRates(2.5e15, 80e12, 8e12, 900e9)),
    ("B200", GpuRates(2.25e15, 75e12, 8e12, 900e9)),
    ("H200", GpuRates(989e12, 67e12, 4.8e12, 450e9)),  # GH200 too
    ("H100 PCIe", GpuRates(756e12, 51e12, 2.0e12, 64e9)),
    ("H100 NVL", GpuRates(835e12, 60e12, 3.9e12, 300e9)),
    ("H100", GpuRates(989e12, 67e12, 3.35e12, 450e9)),
    ("A100-SXM4-40GB", GpuRates(312e12, 19.5e12, 1.555e12, 300e9)),
    ("A100-PCIE-40GB", GpuRates(312e12, 19.5e12, 1.555e12, 32e9)),
    ("A100 80GB PCIe", GpuRates(312e12, 19.5e12, 1.935e12, 32e9)),
    ("A100", GpuRates(312e12, 19.5e12, 2.039e12, 300e9)),
    ("L40S", GpuRates(362e12, 91.6e12, 864e9, 32e9)),
    ("L40", GpuRates(181e12, 90.5e12, 864e9, 32e9)),
    ("RTX 4090", GpuRates(165e12, 82.6e12, 1.008e12, 32e9)),
    ("RTX 3090", GpuRates(71e12, 35.6e12, 936e9, 32e9)),
)

_DEVICES = Path("/dev")


@dataclass(frozen=True)
class Hardware:
    """One rank's share of the machine.

    Attributes:
        name: the device's name, or "CPU".
        kind: "cuda" or "cpu".
        memory: bytes; a GPU's own memory, or this rank's share of the RAM.
        rates: peak rates; None if unknown.
        capability: CUDA compute capability; None on a CPU or if unknown.
        per_machine: GPUs that the run has on each machine, one per rank; None on a CPU or if unknown.
    """

    name: str
    kind: str
    memory: int
    rates: GpuRates | None = None
    capability: tuple[int, int] | None = None
    per_machine: int | None = None

    def peak_flops(self, precision: str) -> float | None:
        """Return the FLOP/s that MFU refers to; None if unknown.

        Args:
            precision: bf16 or fp32.
        """
        if self.rates is None:
            return None
        return self.rates.bf16 if precision == "bf16" else self.rates.fp32


def gpu_rates(device_name: str) -> GpuRates | None:
    """Return a GPU's peak rates by torch's device name; None if unknown."""
    return next((rates for part, rates in _GPUS if part in device_name), None)


def detect(local_rank: int = 0, local_world_size: int = 1) -> Hardware:
    """Detect the device of a local rank, without allocating on it.

    Raises:
        ConfigError: more ranks on this machine than it has GPUs.
    """
    if not torch.cuda.is_available():
        return Hardware("CPU", "cpu", _ram() // local_world_size)
    if local_world_size > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            "--nproc-per-node",
            local_world_size,
            f"torch sees {gpus} GPU(s) on this machine, and each process needs its own",
            f"start torchrun with --nproc-per-node {gpus}",
        )
    properties = torch.cuda.get_device_properties(local_rank)
    capability = (properties.major, properties.minor)
    name = properties.name
    return Hardware(name, "cuda", properties.total_memory, gpu_rates(name), capability, local_world_size)


def detect_own() -> Hardware:
    """Detect this rank's device; without torchrun it is rank 0 of 1.

    Raises:
        ConfigError: as `detect`.
    """
    of_machine, ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE", "1")
    found = detect(_local_rank(), int(of_machine or "1"))
    # Another launcher than torchrun may leave it out: the machine has other ranks then, nobody knows how many.
    return found if of_machine or ranks == "1" else replace(found, per_machine=None)


def open_device(dtype: torch.dtype | None = None) -> None:
    """Create this rank's CUDA context in a thread, during other imports.

    Does nothing without CUDA. If it fails, the rank's first use of the GPU fails too and reports the reason.

    Args:
        dtype: prepare cuBLAS too, for products in it; step 1 would wait for that. Leave it out where settings of cuBLAS
            follow, as in deterministic runs.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", _local_rank())
        threading.Thread(target=_use, args=(device, dtype), name="CUDA context", daemon=True).start()


def _use(device: torch.device, dtype: torch.dtype | None) -> None:
    with suppress(RuntimeError):
        square = torch.zeros(64, 64, dtype=dtype, device=device)
        if dtype is not None:
            torch.mm(square, square)


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def without_driver() -> Iterator[None]:
    """Answer `torch.cuda.is_available` without CUDA's driver.

    Forks of a process that has asked the driver can't use a GPU. megatron-core 0.19 asks when it is imported.
    """
    with mock.patch.object(torch.cuda, "is_available", return_value=may_have_gpu()):
        yield


def may_have_gpu() -> bool:
    """Return whether torch may find a GPU, without CUDA's driver."""
    return torch.backends.cuda.is_built() and _gpu_file() is not None


def _gpu_file() -> Path | None:
    """Return an NVIDIA GPU's device file; a container may lack the first."""
    return next(iter(sorted(_DEVICES.glob("nvidia[0-9]*"))), None)


def hides_gpus() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # Slurm sets the last for jobs without


def check_gpus() -> None:
    """Check that torch sees a GPU if there is evidence of one.

    Evidence comes from the machine, the scheduler or the user.

    Raises:
        ConfigError: it sees none, although CUDA_VISIBLE_DEVICES doesn't hide them.
    """
    if torch.cuda.is_available() or hides_gpus():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if sign := _sign_of_gpus(visible):
        cuda = torch.version.cuda
        cause = "this torch is built without CUDA" if cuda is None else f"torch is built for CUDA {cuda}"
        raise ConfigError(
            "CUDA_VISIBLE_DEVICES",
            "(not set)" if visible is None else visible,
            f"{sign}, but torch sees no GPU ({cause})",
            "Install a build of torch with CUDA, or check the driver (nvidia-smi). To train on the CPU, set"
            ' CUDA_VISIBLE_DEVICES=""',
        )


def _sign_of_gpus(visible: str | None) -> str:
    """Return evidence that there are or should be GPUs, or ""."""
    if (file := _gpu_file()) is not None:
        return f"{file} exists"
    # The first holds the number of GPUs; the second their indices, so 0 is a GPU.
    for name, none in (("SLURM_GPUS_ON_NODE", ("", "0")), ("SLURM_JOB_GPUS", ("",))):
        if (value := os.environ.get(name, "")) not in none:
            return f"{name}={value}"
    return "" if visible is None else "it asks for GPUs"


def _ram() -> int:
    """Return the RAM of the machine or cgroup (v1, v2), in bytes."""
    sizes = [psutil.virtual_memory().total]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such cgroup version, or "max": no limit
            continue
    return min(sizes)
