"""Prepare optimizers other than Adam on one device for loading a checkpoint."""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Make SGD's and the offloaded Adam's checkpoints loadable, which Megatron's are not.

    Megatron calls `init_state_fn` before it loads state, and has none for SGD. The hybrid optimizer's parameter groups
    name the classes that it chains, which torch's safe unpickling has to know.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if isinstance(inner, torch.optim.SGD) and part.init_state_fn is None:
            part.init_state_fn = _zero_momentum
        if isinstance(inner, HybridDeviceOptimizer):
            torch.serialization.add_safe_globals([inner.cpu_optimizer_cls, inner.gpu_optimizer_cls])


def _zero_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    """Start each parameter's momentum at zero, as if torch's first step had added the gradient to it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["momentum"] and not optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
