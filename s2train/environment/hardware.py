"""What the machine offers a rank: its device, how much memory, how fast at its peak."""

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from s2train.errors import ConfigError


class GpuRates(NamedTuple):
    """What a GPU does at its peak, from the maker's data sheets.

    Attributes:
        bf16: FLOP/s of the tensor cores, dense, summed in fp32.
        fp32: FLOP/s without tensor cores: TF32 is off.
        memory: bytes/s.
        link: bytes/s in one direction to the other GPUs of a machine: NVLink, or PCIe where there is none.
    """

    bf16: float
    fp32: float
    memory: float
    link: float


# By part of the device's name, of which the first one found counts.
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

_GPU_FILE = Path("/dev/nvidia0")


@dataclass(frozen=True)
class Hardware:
    """One rank's share of the machine.

    Attributes:
        name: the device's name, or "CPU".
        kind: "cuda" or "cpu".
        memory: bytes; a GPU's own memory, or this rank's share of the RAM.
        rates: at its peak; None where not known.
        capability: CUDA's compute capability, None where there is none or it is not known.
    """

    name: str
    kind: str
    memory: int
    rates: GpuRates | None = None
    capability: tuple[int, int] | None = None

    def peak_flops(self, precision: str) -> float | None:
        """FLOP/s that MFU is measured against, at `precision` bf16 or fp32; None where not known."""
        if self.rates is None:
            return None
        return self.rates.bf16 if precision == "bf16" else self.rates.fp32


def gpu_rates(device_name: str) -> GpuRates | None:
    """The peak rates of a GPU by the name torch gives it; None where not known."""
    return next((rates for part, rates in _GPUS if part in device_name), None)


def detect(local_rank: int = 0, local_world_size: int = 1) -> Hardware:
    """The device of local rank `local_rank`. Allocates nothing on a GPU.

    Raises:
        ConfigError: more ranks on this machine than it has GPUs.
    """
    if not torch.cuda.is_available():
        return Hardware("CPU", "cpu", _ram() // local_world_size)
    if local_world_size > (gpus := torch.cuda.device_count()):
        raise ConfigError(
            "--nproc-per-node",
            local_world_size,
            f"this machine shows {gpus} GPU(s), and each process needs its own",
            f"start torchrun with --nproc-per-node {gpus}",
        )
    properties = torch.cuda.get_device_properties(local_rank)
    capability = (properties.major, properties.minor)
    return Hardware(properties.name, "cuda", properties.total_memory, gpu_rates(properties.name), capability)


def detect_own() -> Hardware:
    """The device of this rank, as torchrun numbers it; a plain `python` is rank 0 of 1.

    Raises:
        ConfigError: as `detect`.
    """
    return detect(_local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def open_device() -> None:
    """Make the CUDA context of this rank's GPU in a thread, while the program imports the rest.

    Does nothing without CUDA. Where it fails, so does the rank's own first use of the GPU, which says why.
    """
    if torch.cuda.is_available():
        threading.Thread(target=_allocate, args=(_local_rank(),), name="CUDA context", daemon=True).start()


def _allocate(local_rank: int) -> None:
    with suppress(RuntimeError):
        torch.zeros(1, device=torch.device("cuda", local_rank))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def check_gpus() -> None:
    """Whether CUDA sees GPUs where the machine, the scheduler or the user says that there are some.

    Raises:
        ConfigError: it sees none. With CUDA_VISIBLE_DEVICES naming none, that is as wished for.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available() or visible in ("", "-1", "NoDevFiles"):  # the last is Slurm's, for a job without GPUs
        return
    if sign := _sign_of_gpus(visible):
        cuda = torch.version.cuda
        cause = "this torch is built without CUDA" if cuda is None else f"torch is built for CUDA {cuda}"
        raise ConfigError(
            "CUDA_VISIBLE_DEVICES",
            "(not set)" if visible is None else visible,
            f"{sign}, but torch sees no GPU ({cause})",
            "Install a build of torch with CUDA, or look at the driver there (nvidia-smi). To train on the CPU, set"
            ' CUDA_VISIBLE_DEVICES=""',
        )


def _sign_of_gpus(visible: str | None) -> str:
    """What says that there are GPUs, or that the user wants them; empty if nothing does."""
    if _GPU_FILE.exists():
        return f"{_GPU_FILE} is there"
    # The number of GPUs; and the number of each, of which 0 is one.
    for name, none in (("SLURM_GPUS_ON_NODE", ("", "0")), ("SLURM_JOB_GPUS", ("",))):
        if (value := os.environ.get(name, "")) not in none:
            return f"{name}={value}"
    return "" if visible is None else "it asks for GPUs"


def _ram() -> int:
    """Bytes of RAM that this process may use: the machine's, or the container's limit (cgroup v2 or v1)."""
    sizes = [psutil.virtual_memory().total]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such cgroup version, or "max": no limit
            continue
    return min(sizes)
