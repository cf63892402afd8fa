"""Freezes the trunk in a run's first steps, and warms up afterwards.

Only the weights that kinds of attention add are trained in these steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from s2train.megatron.core_attention import cores_of


class FrozenTrunk:
    """Freezes the parameters that no kind of attention added.

    They are frozen in the first `last` steps that are taken (0: never). A skipped step doesn't count, here as in
    `LearningRateSchedule`, whose second warm-up begins with the next step. Their gradients are set to zero before the
    norm is taken, and nothing decays in these steps. Adam then moves them by exactly 0, since it has seen no other
    gradient: moments stay 0, also through a checkpoint and in the distributed optimizer. A learning rate of 0 would
    fill the moments, and let the trunk's gradients take part in clipping.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], last: int) -> None:
        own = {id(getattr(core, weight.name)) for core in cores_of(*chunks) for weight in core.own_weights}
        self._last = last
        self._trunk: list[Any] = [p for chunk in chunks for p in chunk.parameters() if id(p) not in own]

    def hold(self, optimizer: MegatronOptimizer, taken: int) -> None:
        """Zero the trunk's gradients, and turn off weight decay, while frozen.

        Call it in each step between the gradients' reduction and their norm.

        Args:
            taken: steps taken before this one, as the schedule counts them.
        """
        if taken >= self._last:
            return
        for parameter in self._trunk:
            parameter.main_grad.zero_()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0  # the schedule sets it again after the step


class LearningRateSchedule(OptimizerParamScheduler):
    """Megatron's schedule, which warms up again after a frozen trunk.

    Otherwise the trunk's first steps would have the full rate. The decay is not moved. It is the rate of all weights:
    parameter groups of the trunk would change the optimizer's saved state.

    Args:
        frozen: steps in which the trunk is frozen; 0: Megatron's schedule alone.
        second_warmup: steps in which the rate then rises from 0 to that of the schedule.
        schedule: of Megatron's class.
    """

    def __init__(self, optimizer: MegatronOptimizer, *, frozen: int, second_warmup: int, **schedule: Any) -> None:
        self._frozen, self._second_warmup = frozen, second_warmup  # Megatron's constructor asks for a rate
        super().__init__(optimizer, **schedule)

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Return the rate of the step after `num_steps`."""
        rate, since = super().get_lr(param_group), self.num_steps - self._frozen
        if not self._frozen or not 0 <= since < self._second_warmup:
            return float(rate)
        return float(rate) * since / self._second_warmup
