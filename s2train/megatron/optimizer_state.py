"""Names optimizers; saves and loads states of SGD and offloaded Adam."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import SGD, MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

_CLASSES = ("cpu_optimizer_cls", "gpu_optimizer_cls")


def prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Make SGD's checkpoints loadable, even before the first step that is taken.

    Megatron calls `init_state_fn` first, and has none for SGD.
    """
    for part in optimizer_parts(optimizer):
        # Megatron's is torch's, apex's or transformer-engine's.
        if isinstance(part.optimizer, (torch.optim.SGD, SGD)) and part.init_state_fn is None:
            part.init_state_fn = _zero_momentum
            _zero_momentum(part.optimizer)


def remove_classes(state: Any) -> None:
    """Remove the optimizer classes from an offloaded Adam's state, in place.

    torch's safe unpickling rejects them in programs without such an optimizer. Loading takes them from the optimizer.

    Args:
        state: sharded state of the optimizer, of any nesting.
    """
    for group in param_groups_in(state):
        for name in _CLASSES:
            group.pop(name, None)


def count_steps_in_parts(optimizer: MegatronOptimizer) -> None:
    """Let an offloaded Adam's parts count steps again after loading.

    Before each step Adam copies its parameter groups over those of its parts. A loaded step count would be copied too,
    and the part on the GPU would take every later step as the first one after loading.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            for group in part.optimizer.param_groups:
                group.pop("step", None)


def implementations(optimizer: MegatronOptimizer) -> str:
    """Name the classes that update the parameters, and torch's fused kernel."""
    found = []
    for part in optimizer_parts(optimizer):
        for inner in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):  # an offloaded Adam's two
            is_fused = isinstance(inner, torch.optim.Adam) and any(group["fused"] for group in inner.param_groups)
            name = f"{type(inner).__module__}.{type(inner).__qualname__}"
            found.append(f"{name} with its fused kernel" if is_fused else name)
    return ", ".join(dict.fromkeys(found))


def optimizer_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that `optimizer` chains, or itself."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def param_groups_in(state: Any) -> Iterator[dict[str, Any]]:
    """Yield the parameter groups of an optimizer's state, of any nesting."""
    if isinstance(state, dict):
        yield from state.get("param_groups", [])
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from param_groups_in(value)


def _zero_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Start each parameter's momentum at zero.

    Adding the first gradient to zero gives the momentum that torch's first step sets.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
