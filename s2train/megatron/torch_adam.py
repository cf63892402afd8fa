"""Use torch's AdamW under Megatron's distributed optimizer, without apex or transformer-engine.

Megatron's checkpoint code expects a fused Adam whose `step` belongs to the group. torch keeps one `step` tensor per
parameter. Megatron first doesn't find these in a checkpoint and then replaces them by one shared tensor that every
parameter advances: the loss after a resume would be silently wrong.
"""

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from s2train.megatron.local_optimizer_state import distributed_parts


def _affected(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    return [part for part in distributed_parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW)]


def prepare_for_checkpoints(optimizer: MegatronOptimizer) -> None:
    """Make the optimizer save and load its moments correctly.

    Other optimizers than torch's AdamW are left unchanged.
    """
    for part in _affected(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        _leave_out_step(part)


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
