"""Freezes the trunk in a run's first steps.

Only the weights that kinds of attention add are trained in these steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from s2train.megatron.core_attention import cores_of


class FrozenTrunk:
    """Freezes the parameters that no kind of attention added.

    They are frozen up to step `last` (0: never). Their gradients are set to zero before the norm is taken, and
    nothing decays in these steps. Adam then moves them by exactly 0, since it has seen no other gradient: moments stay
    0, also through a checkpoint and in the distributed optimizer. A learning rate of 0 would fill the moments, and let
    the trunk's gradients take part in clipping.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], last: int) -> None:
        own = {id(getattr(core, weight.name)) for core in cores_of(*chunks) for weight in core.own_weights}
        self._last = last
        self._trunk: list[Any] = [p for chunk in chunks for p in chunk.parameters() if id(p) not in own]

    def hold(self, optimizer: MegatronOptimizer, step: int) -> None:
        """Zero the trunk's gradients, and turn off weight decay, while frozen.

        Call it in each step, counted from 1, between the gradients' reduction and their norm.
        """
        if step > self._last:
            return
        for parameter in self._trunk:
            parameter.main_grad.zero_()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0  # the schedule sets it again after the step
