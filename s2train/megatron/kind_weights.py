"""Parameters of a kind of attention: initial values, gradients, checkpoint shards."""

from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

from s2train.attention.random_numbers import stateless_seed
from s2train.attention.weights import Weight

GAIN = "is_gain"  # attribute of parameters


class KindWeights(torch.nn.Module):
    """Mixin for a `MegatronModule` with `seed`, `layer_number` (from 1) and `tp_group`."""

    seed: int
    layer_number: int
    tp_group: torch.distributed.ProcessGroup

    def make_weights(self, weights: tuple[Weight, ...], dtype: torch.dtype) -> None:
        """Make this rank's part of each weight, without using torch's random generators."""
        self.own_weights = weights
        tp, rank = self.tp_group.size(), self.tp_group.rank()
        for weight in weights:
            part = initial_value(weight, self.seed, self.layer_number)
            if weight.split is not None:
                part = part.chunk(tp, weight.split)[rank].clone()
            parameter = torch.nn.Parameter(part.to(dtype))
            setattr(parameter, GAIN, weight.is_gain)
            if weight.split is not None:
                set_tensor_model_parallel_attributes(parameter, True, weight.split, 1)
            self.register_parameter(weight.name, parameter)

    def weight(self, name: str) -> torch.Tensor:
        """Return a weight to compute with.

        A weight that every tensor parallel rank holds gets the sum of the ranks' gradients, because each rank has only
        some of the heads and thus a part of the loss.
        """
        (weight,) = (weight for weight in self.own_weights if weight.name == name)
        parameter: torch.Tensor = getattr(self, name)
        if weight.split is not None or self.tp_group.size() == 1:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's sharded state dict, with separate names for this layer's weights.

        Megatron stacks a weight over all layers of a model, but other layers may be of another kind.
        """
        found: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]} if self.own_weights else {}
        for weight in self.own_weights:
            parameter = getattr(self, weight.name)
            key = f"{prefix}layer_{self.layer_number - 1}.{weight.name}"
            found[prefix + weight.name] = (
                make_sharded_tensor_for_checkpoint(parameter, key, **groups)
                if weight.split is None
                else make_tp_sharded_tensor_for_checkpoint(parameter, key, weight.split, **groups)
            )
        return found


def initial_value(weight: Weight, seed: int, layer_number: int) -> torch.Tensor:
    """Return the whole weight's initial values, float32 on the CPU."""
    if weight.std is None:
        return torch.full(weight.shape, weight.fill)
    generator = torch.Generator().manual_seed(stateless_seed(seed, "initial", layer_number, weight.name))
    return torch.empty(weight.shape).normal_(std=weight.std, generator=generator)
