"""Keeps an optimizer's views between steps, and copies weights together.

Megatron slices every gradient and weight in each step, and copies weights one by one. At the end of a step the GPU
waits for that.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from s2train.megatron.optimizer_state import optimizer_parts


def keep_views(optimizer: MegatronOptimizer) -> None:
    """Replace methods of the optimizers that hold fp32 weights.

    Megatron's stay for FP8 parameters, gradients that aren't fp32, and weights that Adam itself writes.
    """
    for part in optimizer_parts(optimizer):
        if part.is_stub_optimizer:
            continue
        if isinstance(part, DistributedOptimizer):
            if _can_keep_views(part):
                views = _Views(part)
                part.zero_grad = views.drop_gradients
                part._copy_model_grads_to_main_grads = views.set_gradients
                part._copy_main_params_to_model_params = views.copy_weights
        elif isinstance(part, Float16OptimizerWithFloat16Params):
            groups = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            part._copy_main_params_to_model_params = _Copies(
                [pair for group in groups for pair in zip(*group, strict=True)]
            )


def _can_keep_views(part: DistributedOptimizer) -> bool:
    if part.ddp_config.use_megatron_fsdp or part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return False
    return all(
        buffer.grad_dtype == torch.float32 and all(type(parameter) is torch.nn.Parameter for parameter in buffer.params)
        for buffer in part.buffers
    )


@dataclass
class _Shard:
    """This rank's part of a parameter.

    Attributes:
        master: its fp32 weights [n], or in an fp32 model a view of the parameter.
        part: its place in the parameter.
        bucket, place: the bucket that holds it, and its place in the bucket.
        whole: the parameter's gradient that `gradient` is a view of.
        gradient: [n].
    """

    parameter: Any  # `main_grad` is Megatron's
    master: Tensor
    part: slice
    bucket: Any
    place: slice
    whole: Tensor | None = None
    gradient: Tensor | None = None


class _Views:
    """Views of a distributed optimizer, and three of its methods with them."""

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        parameters = [*optimizer.model_float16_groups, *optimizer.model_fp32_groups]
        masters = [*optimizer.shard_fp32_from_float16_groups, *optimizer.shard_fp32_groups]
        self._shards = [
            _shard(optimizer, parameter, master)
            for group in zip(parameters, masters, strict=True)
            for parameter, master in zip(*group, strict=True)
        ]
        self._buckets = list({id(shard.bucket): shard.bucket for shard in self._shards}.values())
        self._memory: list[Tensor] = []
        self._copies = _Copies([])

    def drop_gradients(self, set_to_none: bool = True) -> None:
        """Replace `zero_grad`; the views stay."""
        assert set_to_none, "the gradients are views: zero the buffers instead"
        for shard in self._shards:
            shard.parameter.grad = shard.master.grad = None

    def set_gradients(self) -> None:
        """Replace `_copy_model_grads_to_main_grads`."""
        for shard in self._shards:
            whole = shard.parameter.main_grad  # Megatron replaces some of them in a step with sequence parallel
            if whole is not shard.whole:
                shard.whole, shard.gradient = whole, whole.view(-1)[shard.part]
            shard.master.grad = shard.gradient

    def copy_weights(self) -> None:
        """Replace `_copy_main_params_to_model_params`."""
        memory = [bucket.param_data for bucket in self._buckets]
        if len(self._memory) != len(memory) or any(a is not b for a, b in zip(memory, self._memory, strict=True)):
            self._memory = memory
            self._copies = _Copies(
                [(shard.bucket.param_data.view(-1)[shard.place], shard.master) for shard in self._shards]
            )
        self._copies()


class _Copies:
    """Copies that are made together.

    torch copies lists in few kernels if all targets have one dtype, and all sources one.
    """

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Group pairs of target and source by their dtypes."""
        groups: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for target, source in pairs:
            targets, sources = groups[target.dtype, source.dtype]
            targets.append(target)
            sources.append(source)
        self._lists = list(groups.values())

    def __call__(self) -> None:
        for targets, sources in self._lists:
            torch._foreach_copy_(targets, sources)


def _shard(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, master: Tensor) -> _Shard:
    ranges = optimizer._get_model_param_range_map(parameter)
    buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
    part, place = (slice(ranges[name].start, ranges[name].end) for name in ("param", "gbuf_world_in_bucket"))
    return _Shard(parameter, master, part, optimizer.buffers[buffer].buckets[bucket], place)
