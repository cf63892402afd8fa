"""Makes communication on GPUs start in the order of calls.

Megatron, and `parallel.tp_comm_chunks`, call communication first and then the products that hide it. With several
hardware queues the products can start first and take all multiprocessors; communication then waits for their end.
"""

import ctypes
import os

import torch

from s2train.config import ParallelConfig
from s2train.environment.hardware import hides_gpus, may_have_gpu

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
_ORDERED = "1"
_BLACKWELL = (10, 0)  # from here on, order doesn't depend on it
_LIBRARY = "libnvidia-ml.so.1"


def order_communication(parallel: ParallelConfig) -> str | None:
    """Set one hardware queue where needed, unless the user set a number.

    Call before anything asks CUDA's driver, which reads the variable once. The rule is Megatron's (validate_args in
    megatron/training/arguments.py): tensor or context parallel ranks, on GPUs before Blackwell.

    Returns:
        What the user's value loses, or None.
    """
    if not _needs_order(parallel):
        return None
    value = os.environ.setdefault(NAME, _ORDERED)
    if value == _ORDERED or parallel.tp == 1:
        return None
    return (
        f"{NAME}={value} is kept: communication of parallel.tp={parallel.tp} may start after the products that should"
        f" hide it, which makes steps longer. Unset it, or set {_ORDERED}"
    )


def queues() -> str | None:
    """Format the number of queues; None if it is CUDA's default."""
    return f"{NAME}={os.environ[NAME]}" if NAME in os.environ else None


def _needs_order(parallel: ParallelConfig) -> bool:
    if parallel.tp == parallel.cp == 1 or hides_gpus() or not torch.backends.cuda.is_built():
        return False
    capabilities = gpu_capabilities()
    return min(capabilities) < _BLACKWELL if capabilities else may_have_gpu()


def gpu_capabilities() -> list[tuple[int, int]]:
    """Return compute capabilities of this machine's GPUs, without CUDA's driver.

    NVIDIA's management library lists them, those left out by CUDA_VISIBLE_DEVICES too. Empty without it.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return []
    if library.nvmlInit_v2():
        return []
    count, found = ctypes.c_uint(), []
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
        failed = library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
        if not failed and not library.nvmlDeviceGetCudaComputeCapability(
            device, ctypes.byref(major), ctypes.byref(minor)
        ):
            found.append((major.value, minor.value))
    library.nvmlShutdown()
    return found
