"""Selects the operations that Liger-Kernel computes in a run.

Settings name them; `auto` selects the verified ones. One is a kernel of ours in place of Liger-Kernel's.
"""

import importlib
from functools import cache

from s2train.config import PretrainConfig
from s2train.environment.imports import left_out
from s2train.errors import message_line
from s2train.kernels.verified import verified
from s2train.kernels.versions import installed_version

PACKAGE = "liger-kernel"
INSTALL = "pip install 's2train[liger]'"
# Operations of the setting `elementwise`; `loss` has its own. Norms without a sum before them stay torch's: Liger's
# RMSNorm takes 0.43 ms, torch's 0.39 (launch/results/2026-11-28-h100-elementwise.json). The split of the
# projection into heads is our kernel's, which rotates them too.
SWIGLU, ROTATION, SPLIT, SUMS = "swiglu", "rotation", "split", "sums"
OPERATIONS = (SWIGLU, ROTATION, SPLIT, SUMS)
_LOSSES = ("in_place", "liger")  # values of the setting `loss` that `auto` takes, the fastest first
WITHOUT_TP = ("in_place", "linear")  # values that need the output layer whole
_UNCHECKED = "was not checked for"
RELEASE = "0.8.5"  # whose kernels s2train launches itself: SwiGLU, residual sums, the loss in place


@cache
def liger_problem() -> str | None:
    """Import Liger-Kernel; explain why it can't be used, or None.

    Leaves out peft and transformers, which it imports if they are installed, with up to 2,300 other modules (scipy,
    pandas, …). It uses peft to patch Hugging Face's models, and transformers to find an NPU.
    """
    release = installed_version(PACKAGE)
    if release is None:
        return f"{PACKAGE} is not installed"
    try:
        with left_out("peft", "transformers"):
            importlib.import_module("torch.distributed.tensor")  # it assumes that torch has imported it
            importlib.import_module("liger_kernel.ops")
    except Exception as error:  # wrong Triton version, missing module
        return f"{PACKAGE} {release} can't be imported ({message_line(error)})"
    return None


def liger_operations(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> frozenset[str]:
    """Return the `OPERATIONS` that Liger-Kernel, or our split, computes in this run.

    Args:
        capability: the GPU's compute capability; None: a CPU.
        te: layers are transformer-engine's, which has its own RoPE kernel, and norms within linear layers.
    """
    if cfg.elementwise == "torch":
        return frozenset()
    own = [SWIGLU] if te else [name for name in OPERATIONS if _unserved(cfg, name) is None]
    if cfg.elementwise == "liger":
        return frozenset(own)
    return frozenset(name for name in own if _why_not(cfg, name, capability, te) is None)


def choose_loss(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> str:
    """Resolve the run's `loss` to torch, liger, in_place or linear.

    Arguments as of `liger_operations`. `auto` is in_place or liger if verified in the run's precision, which requires
    tp=1. linear takes less memory and more time.
    """
    if cfg.loss != "auto":
        return cfg.loss
    return next((loss for loss in _LOSSES if _why_not(cfg, f"loss {loss}", capability, te) is None), "torch")


def kernels_line(cfg: PretrainConfig, capability: tuple[int, int] | None, te: bool) -> str:
    """Format for the log what computes SwiGLU, RoPE, sums and loss.

    Includes why it is not Liger-Kernel. Empty on a CPU.
    """
    if capability is None:
        return ""
    chosen, loss = liger_operations(cfg, capability, te), choose_loss(cfg, capability, te)
    used = {name: "liger" if name in chosen else "torch" for name in OPERATIONS if not te or name == SWIGLU}
    if SWIGLU in chosen and installed_version(PACKAGE) != RELEASE:
        used[SWIGLU] = "liger's own launch"
    if SPLIT in chosen:
        used[SPLIT] = used[ROTATION] = "s2train"
    used["loss"] = loss
    reasons = []
    for name, way in used.items():
        asked, case = (cfg.loss, "loss liger") if name == "loss" else (cfg.elementwise, name)
        if way != "torch" or asked == "torch":
            continue
        why_not = _unserved(cfg, case) or (_why_not(cfg, case, capability, te) if asked == "auto" else None)
        if why_not not in reasons:
            reasons.append(why_not)
    if any(_UNCHECKED in (why or "") for why in reasons):
        reasons.append("to check: python launch/check_libraries.py FOLDER, see docs/backends.md")
    why = f" ({'; '.join(filter(None, reasons))})" if reasons else ""
    return ", ".join(f"{name} {way}" for name, way in used.items()) + why


def _unserved(cfg: PretrainConfig, operation: str) -> str | None:
    """Explain why an operation is torch's even if asked for."""
    if operation == SPLIT and cfg.parallel.tp > cfg.model.num_query_groups:
        return "the split needs whole KV heads on each rank"
    if operation == SPLIT and cfg.model.qk_norm:
        return "the split rotates queries and keys, which model.qk_norm normalizes before"
    if operation != SUMS:
        return None
    if cfg.train.recompute == "mlp":
        return "train.recompute=mlp recomputes norms, without the sums before them"
    if (release := installed_version(PACKAGE)) not in (None, RELEASE):
        return f"sums are those of {PACKAGE} {RELEASE}, and {release} is installed"
    return None


def _why_not(cfg: PretrainConfig, operation: str, capability: tuple[int, int] | None, te: bool) -> str | None:
    """Explain why `auto` rejects Liger-Kernel for an operation, or None."""
    if capability is None:
        return "there is no CUDA device"
    if te:
        return "not with transformer-engine's layers, unless asked for"
    release = installed_version(PACKAGE)
    if release is None:
        return f"{PACKAGE} is not installed"
    if operation.startswith("loss") and cfg.parallel.tp > 1:
        return "its loss was not checked under tensor parallelism"
    if operation == SPLIT and (why := _why_not(cfg, ROTATION, capability, te)) is not None:
        return why  # it takes the rotation's place
    case = f"{operation} {cfg.train.precision}"
    library = "triton" if operation == SPLIT else PACKAGE
    release = installed_version(library)
    if verified(library, release, capability, case) is None:
        on = ".".join(map(str, capability))
        return f"{library} {release} {_UNCHECKED} {case} on compute capability {on}"
    return None
