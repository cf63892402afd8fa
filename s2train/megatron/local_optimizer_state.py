"""Loads only a rank's own optimizer state; saves all of it correctly.

Megatron makes every data parallel rank read the whole model's state and hold it in host memory, 12 bytes a parameter.
On a node of eight GPUs that is 670 GB for 7B parameters, and eight times the reading. Its saved state is wrong behind a
padded bucket (`_padding_counted`).
"""

from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from s2train.megatron.optimizer_state import optimizer_parts

_STATES = ("param", "exp_avg", "exp_avg_sq")
_COMPARED = 512  # elements at each end of a parameter
_ROUNDING = 2.0**-7  # relative; more than bf16's


def distributed_parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the distributed optimizers that `optimizer` chains, or itself."""
    return [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]


def load_only_local_state(optimizer: MegatronOptimizer) -> None:
    """Make distributed optimizers load only local states, and save correct ones.

    The load does not check that all ranks together request every tensor completely.
    """
    for part in distributed_parts(optimizer):
        whole = part.sharded_param_state_fully_reshardable
        part.sharded_param_state_fully_reshardable = partial(_sharded_state, part, whole)
        # transformer-engine's Adam would copy moments that are already fp32, all at once.
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
    """Return the fully reshardable optimizer state; for a load, only this rank's.

    `whole` is `sharded_param_state_fully_reshardable`. A load requests only parameters that have a part here.
    """
    if not is_loading:
        with _padding_counted(part):
            saved: dict[int, dict[str, Any]] = whole(model_sharded_state_dict, is_loading, metadata)
        return saved
    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {value.data: value for value in nested_values(sharded)}
    wanted, index = {}, 0
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()  # all of one dtype
        own = ChainMap(*(bucket["param_map"] for bucket in buckets))
        for parameter in buffer.param_index_map:  # Megatron numbers all of them
            if parameter in own:
                wanted[index] = {name: _like(of_parameter[parameter], name) for name in _STATES}
            index += 1
    return wanted


def has_shifted_weights(optimizer: MegatronOptimizer, loaded: Any) -> bool:
    """Whether a loaded state has other weights than this rank's model.

    Checkpoints of earlier versions hold the states of shifted elements behind a padded bucket. Elements at both ends
    of each parameter are compared, up to the rounding of the model's weights. Call it before the optimizer loads the
    state, with the checkpoint's weights in the model: in fp32 the two are the same memory afterwards.

    Args:
        loaded: what the optimizer's `load_state_dict` takes.
    """
    parts = optimizer_parts(optimizer)
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    return any(
        _differ(state["param_state"][index]["param"], parameter)
        for part, state in zip(parts, states, strict=True)
        if isinstance(part, DistributedOptimizer)
        for index, parameter in enumerate(parameter for buffer in part.buffers for parameter in buffer.param_index_map)
        if index in (state.get("param_state") or {})
    )


def _differ(master: torch.Tensor, weight: torch.Tensor) -> bool:
    """Compare the ends of an fp32 copy with those of its weight."""
    for part in (slice(_COMPARED), slice(-_COMPARED, None)):
        saved, used = (x.detach().flatten()[part].float().cpu() for x in (master, weight))
        if bool(((saved - used).abs() > _ROUNDING * saved.abs() + torch.finfo(torch.bfloat16).tiny).any()):
            return True
    return False


@contextmanager
def _padding_counted(part: DistributedOptimizer) -> Iterator[None]:
    """Let the gathered states keep the padding at each bucket's end.

    Megatron leaves it out, but finds parameters by their positions with it: behind a padded bucket it would save the
    states of shifted elements.
    """
    padded = [x for buffer in part.buffers for x in (buffer, *buffer.buckets)]
    before = [x.numel_unpadded for x in padded]
    for x in padded:
        x.numel_unpadded = x.grad_data.numel()
    try:
        yield
    finally:
        for x, count in zip(padded, before, strict=True):
            x.numel_unpadded = count


def _like(parameter: Any, state: str) -> Any:
    """Return the tensor to request for a parameter's state, in host memory."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{state}.{parameter.key}",
        "data": torch.empty(parameter.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(parameter, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(parameter, **changes)
