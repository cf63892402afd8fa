"""Which operations Liger-Kernel computes in a run: those asked for by name, and with `auto` those verified."""

import importlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from s2train.config import PretrainConfig
from s2train.kernels.verified import verified

INSTALL = "pip install 's2train[liger]'"
# What `elementwise` stands for; `loss` has its own setting. Liger's RMSNorm took 0.43 ms where torch's took 0.39
# (launch/results/2026-11-28-h100-elementwise.json): norms stay torch's.
SWIGLU, ROTATION = "swiglu", "rotation"
OPERATIONS = (SWIGLU, ROTATION)
_LOSS = "loss liger"


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
        return f"liger-kernel {liger_version()} can't be imported ({lines[0]})"
    return None


def liger_operations(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> frozenset[str]:
    """Those of `OPERATIONS` that Liger-Kernel computes on a GPU of this compute capability (None: a CPU).

    Args:
        te: layers are transformer-engine's, which has a rotation of its own.
    """
    own = {SWIGLU} if te else set(OPERATIONS)
    if cfg.elementwise != "auto":
        return frozenset(own if cfg.elementwise == "liger" else ())
    return frozenset(name for name in own if _why_not(cfg, name, capability, te) is None)


def choose_loss(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> str:
    """`torch`, `liger` or `linear`: what the run's `loss` stands for; arguments as of `liger_operations`.

    `auto` is liger where that was verified in the run's precision, which is without tensor parallelism; linear takes
    less memory and more time.
    """
    if cfg.loss != "auto":
        return cfg.loss
    return "liger" if _why_not(cfg, _LOSS, capability, te) is None else "torch"


def kernels_line(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> str:
    """What computes SwiGLU, rotation and loss, and why not Liger-Kernel, for the log; "" on a CPU."""
    if capability is None:
        return ""
    chosen, loss = liger_operations(cfg, capability, te), choose_loss(cfg, capability, te)
    used = {name: "liger" if name in chosen else "torch" for name in OPERATIONS if not te or name == SWIGLU}
    used["loss"] = loss
    reasons = []
    for name, way in used.items():
        asked, case = (cfg.loss, _LOSS) if name == "loss" else (cfg.elementwise, name)
        if way == "torch" and asked == "auto" and (why := _why_not(cfg, case, capability, te)) not in reasons:
            reasons.append(why)
    why = f" ({'; '.join(filter(None, reasons))})" if reasons else ""
    return ", ".join(f"{name} {way}" for name, way in used.items()) + why


def _why_not(cfg: PretrainConfig, operation: str, capability: tuple[int, int] | None, te: bool) -> str | None:
    """Why `auto` does not take Liger-Kernel for an operation; None if it does."""
    if capability is None:
        return "there is no CUDA device"
    if te:
        return "not with transformer-engine's layers, unless asked for"
    if liger_version() is None:
        return "liger-kernel is not installed"
    if operation == _LOSS and cfg.parallel.tp > 1:
        return "its loss was not checked under tensor parallelism"
    case = f"{operation} {cfg.train.precision}"
    if verified("liger-kernel", liger_version(), capability, case) is None:
        on = ".".join(map(str, capability))
        return f"liger-kernel {liger_version()} was not checked for {case} on compute capability {on}"
    return None
