"""Whether Liger-Kernel is there, and whether `auto` takes it."""

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from s2train.config import PretrainConfig
from s2train.kernels.verified import verified

INSTALL = "pip install 's2train[liger]'"
OPERATIONS = ("norm", "swiglu")  # what `elementwise` stands for; `loss` has its own setting


@cache
def liger_version() -> str | None:
    """The installed release, None where there is none. Imports nothing."""
    try:
        return version("liger-kernel")
    except PackageNotFoundError:
        return None


@cache
def liger_problem() -> str | None:
    """Why Liger-Kernel can't be used, None if it can; imports its operations."""
    if liger_version() is None:
        return "liger-kernel is not installed"
    try:
        importlib.import_module("torch.distributed.tensor")  # it takes torch to have loaded it
        importlib.import_module("liger_kernel.ops")
    except Exception as error:  # another Triton, a missing part
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"liger-kernel can't be imported ({lines[0]})"
    return None


def choose_elementwise(cfg: PretrainConfig, capability: tuple[int, int] | None) -> str:
    """`torch` or `liger`: what the run's `elementwise` stands for on a GPU of this compute capability (None: a CPU).

    `auto` is liger with backend=local where all of it was verified in the run's precision.
    """
    if cfg.elementwise != "auto":
        return cfg.elementwise
    return "liger" if all(_is_verified(cfg, name, capability) for name in OPERATIONS) else "torch"


def choose_loss(cfg: PretrainConfig, capability: tuple[int, int] | None) -> str:
    """`torch`, `liger` or `linear`: what the run's `loss` stands for.

    `auto` is linear without tensor parallelism, liger with it, where that was verified in the run's precision.
    """
    if cfg.loss != "auto":
        return cfg.loss
    name = "linear" if cfg.parallel.tp == 1 else "liger"
    return name if _is_verified(cfg, f"loss {name}", capability) else "torch"


def _is_verified(cfg: PretrainConfig, operation: str, capability: tuple[int, int] | None) -> bool:
    if cfg.backend == "te" or capability is None or liger_version() is None:
        return False
    case = f"{operation} {cfg.train.precision}"
    return verified("liger-kernel", liger_version(), capability, case) is not None
