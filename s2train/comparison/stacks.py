"""The ways of attending that long steps compare, each with the fastest stack that is installed for it."""

from collections.abc import Sequence
from dataclasses import dataclass

from s2train.environment.hardware import Hardware
from s2train.environment.liger import liger_version
from s2train.environment.transformer_engine import te_problem
from s2train.kernels.flash4 import fa4_version


@dataclass(frozen=True)
class Way:
    """One contender.

    Attributes:
        name: begins with "hybrid" or "dense".
        variant: of the model, as in SIZE_variant.
        settings: what distinguishes it from others of the variant: layout, dense layers' kernels, the stack around.
    """

    name: str
    variant: str
    settings: tuple[str, ...]


def ways_to_compare(hardware: Hardware, layouts: Sequence[str]) -> list[Way]:
    """Hybrids of these layer strings, then dense models: the fastest installed, cuDNN's, FlashAttention-2's.

    All have the same elementwise work and loss, Liger-Kernel's where it is installed; with transformer-engine
    installed, its layers in bf16 and FP8 are ways too.
    """
    hybrids = {f"hybrid {letters}": (f"layout.layers={letters}",) for letters in layouts}
    if hardware.kind != "cuda":
        found = [Way(name, "hybrid", layout) for name, layout in hybrids.items()]
        return [*found, Way("dense", "dense", ())]
    around = ("elementwise=liger", "loss=liger") if liger_version() else ("elementwise=torch", "loss=torch")
    local = ("backend=local", *around)
    best, label = ("fa4", "FlashAttention-4") if fa4_version() else ("s2train", "s2train")
    fastest = f"dense_attention={best}"
    found = [Way(name, "hybrid", (*layout, fastest, *local)) for name, layout in hybrids.items()]
    found.append(Way(f"dense {label}", "dense", (fastest, *local)))
    found.append(Way("dense cuDNN", "dense", ("dense_attention=cudnn", *local)))
    found.append(Way("dense FlashAttention-2", "dense", ("dense_attention=flash", *local)))
    if te_problem() is None:
        for suffix, te in {"TE": ("backend=te",), "TE FP8": ("backend=te", "fp8=hybrid")}.items():
            settings = (fastest, *te, *around)
            found += [Way(f"{name}, {suffix}", "hybrid", (*layout, *settings)) for name, layout in hybrids.items()]
            found.append(Way(f"dense {label}, {suffix}", "dense", settings))
    return found
