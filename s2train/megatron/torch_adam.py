"""Use torch's AdamW in Megatron, without apex or transformer-engine.

On a GPU, torch's fused kernel updates all parameters: it reads and writes weights and moments once. Megatron leaves the
choice to torch, which takes a dozen kernels and, in each, a pass over the same memory.

The fused kernel needs each `step` on the parameter's device; without it, `step` is in host memory. Checkpoints hold it
in host memory, and any Adam loads another's.

Megatron's checkpoint code expects a fused Adam whose `step` belongs to the group. torch keeps one `step` tensor per
parameter. Megatron first doesn't find these in a checkpoint and then replaces them by one shared tensor that every
parameter advances: the loss after a resume would be silently wrong.
"""

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from s2train.megatron.local_optimizer_state import distributed_parts
from s2train.megatron.optimizer_state import optimizer_parts


def _affected(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return [part for part in distributed_parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW)]


def fuse_on_gpus(optimizer: MegatronOptimizer) -> None:
    """Update GPU parameters by torch's fused kernel.

    Other optimizers than torch's AdamW are left unchanged. Call it before `prepare_for_checkpoints`.
    """
    for part in optimizer_parts(optimizer):
        inner = part.optimizer
        if isinstance(inner, torch.optim.AdamW) and all(one.is_cuda for one in _parameters(inner)):
            fuse(inner)


def fuse(optimizer: torch.optim.AdamW) -> None:
    """Update all parameters by torch's fused kernel, from the next step on."""
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings["fused"] = True


def prepare_for_checkpoints(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer save and load its moments correctly.

    They exist from the start: a checkpoint before the first step that is taken would lack them, and could not be
    loaded. Other optimizers than torch's AdamW are left unchanged.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            _begin(part.optimizer)
    for part in _affected(optimizer):
        _leave_out_step(part)


def _begin(optimizer: torch.optim.AdamW) -> None:
    """Set each parameter's state to that before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def move_steps_to_host(state: Any) -> None:
    """Move an optimizer's step counts to host memory, in place.

    Megatron pickles them with the parameter groups, and a tensor on a GPU can be loaded only where that GPU is.

    Args:
        state: sharded state of the optimizer, of any nesting.
    """
    if isinstance(state, dict):
        if isinstance(step := state.get("common_step"), torch.Tensor):
            state["common_step"] = step.cpu()
        for value in state.values():
            move_steps_to_host(value)
    elif isinstance(state, list | tuple):
        for value in state:
            move_steps_to_host(value)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _leave_out_step(part: DistributedOptimizer) -> None:
    def sharded_parameter(model_parameter: torch.nn.Parameter) -> torch.Tensor:
        group, order = part.model_param_group_index_map[model_parameter]
        return part.optimizer.param_groups[group]["params"][order]

    def states(model_parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        parameter = sharded_parameter(model_parameter)
        moments = {k: v for k, v in part.optimizer.state[parameter].items() if k != "step"}
        return {"param": parameter, **moments}

    @torch.no_grad()
    def set_states(model_parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        for name, target in states(model_parameter).items():
            target.copy_(tensors[name])

    part._get_main_param_and_optimizer_states = states
    part._set_main_param_and_optimizer_states = set_states


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter a separate step counter again, after loading."""
    for part in _affected(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()
