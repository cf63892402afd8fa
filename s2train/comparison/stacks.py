"""Lists the stacks that long steps compare.

Each consists of the fastest installed kernels for its attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from s2train.environment import liger
from s2train.environment.hardware import Hardware
from s2train.environment.transformer_engine import te_problem
from s2train.kernels import flash4
from s2train.kernels.versions import installed_version


@dataclass(frozen=True)
class Stack:
    """A model and the settings of its kernels and layers.

    Attributes:
        name: begins with "hybrid" or "dense".
        model: suffix of the model's name, SIZE_model.
        settings: layout, kernels of dense layers, and the other layers.
    """

    name: str
    model: str
    settings: tuple[str, ...]


def stacks_to_compare(hardware: Hardware, layouts: Sequence[str]) -> list[Stack]:
    """List stacks of hybrids with these layer strings, then of dense models.

    Dense models use the fastest installed attention, cuDNN's and FlashAttention-2's. All have the same elementwise
    operations and loss, Liger-Kernel's if it is installed. If transformer-engine is installed, stacks with its layers
    in bf16 and FP8 are added.
    """
    hybrids = {f"hybrid {letters}": (f"layout.layers={letters}",) for letters in layouts}
    if hardware.kind != "cuda":
        found = [Stack(name, "hybrid", layout) for name, layout in hybrids.items()]
        return [*found, Stack("dense", "dense", ())]
    elementwise = (
        ("elementwise=liger", "loss=liger") if installed_version(liger.PACKAGE) else ("elementwise=torch", "loss=torch")
    )
    local = ("layer_backend=local", *elementwise)
    best, label = ("fa4", "FlashAttention-4") if installed_version(flash4.PACKAGE) else ("s2train", "s2train")
    fastest = f"dense_attention={best}"
    found = [Stack(name, "hybrid", (*layout, fastest, *local)) for name, layout in hybrids.items()]
    found.append(Stack(f"dense {label}", "dense", (fastest, *local)))
    found.append(Stack("dense cuDNN", "dense", ("dense_attention=cudnn", *local)))
    found.append(Stack("dense FlashAttention-2", "dense", ("dense_attention=flash", *local)))
    if te_problem() is None:
        for suffix, te in {"TE": ("layer_backend=te",), "TE FP8": ("layer_backend=te", "fp8=hybrid")}.items():
            settings = (fastest, *te, *elementwise)
            found += [Stack(f"{name}, {suffix}", "hybrid", (*layout, *settings)) for name, layout in hybrids.items()]
            found.append(Stack(f"dense {label}, {suffix}", "dense", settings))
    return found
