"""The distributed optimizer's state as a rank loads it: the parameters that it keeps, and no second copy on the GPU.

Megatron has every data parallel rank read, and hold in its machine's memory, the state of the whole model, 12 bytes a
parameter: on a node of eight GPUs 670 GB for 7B parameters, and eight times the reading.
"""

from collections import ChainMap
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_STATES = ("param", "exp_avg", "exp_avg_sq")


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers among those that `optimizer` chains, or it alone."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer)]


def load_own_state_alone(optimizer: MegatronOptimizer) -> None:
    """Make its distributed parts load so; load without checking that ranks together ask for all of every tensor."""
    for part in distributed_parts(optimizer):
        whole = part.sharded_param_state_fully_reshardable
        part.sharded_param_state_fully_reshardable = partial(_sharded_state, part, whole)
        # transformer-engine's Adam would copy moments that are fp32 already, both at once.
        inner = part.optimizer
        if type(inner).load_state_dict is not torch.optim.Optimizer.load_state_dict:
            inner.load_state_dict = partial(torch.optim.Optimizer.load_state_dict, inner)


def _sharded_state(
    part: DistributedOptimizer,
    whole: Any,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, dict[str, Any]]:
    """`sharded_param_state_fully_reshardable`, which is `whole`; to load, of the parameters that have a part here."""
    if not is_loading:
        saved: dict[int, dict[str, Any]] = whole(model_sharded_state_dict, is_loading, metadata)
        return saved
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {value.data: value for value in nested_values(sharded)}
    wanted, index = {}, 0
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()  # of one dtype
        own = ChainMap(*(bucket["param_map"] for bucket in buckets))
        for parameter in buffer.param_index_map:  # Megatron counts all of them
            if parameter in own:
                wanted[index] = {name: _like(of_parameter[parameter], name) for name in _STATES}
            index += 1
    return wanted


def _like(parameter: Any, state: str) -> Any:
    """What is asked for as a parameter's state, in the machine's memory."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{state}.{parameter.key}",
        "data": torch.empty(parameter.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(parameter, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(parameter, **changes)
