"""Compares the memory of changed settings with a device's."""

from dataclasses import dataclass

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.implementations import Implementations
from s2train.costs.memory import Memory, rank_memory
from s2train.costs.stages import LayerFlops, pipeline_stages
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.validation.division import check_division


@dataclass(frozen=True)
class MemoryBudget:
    """A device's memory, and what a run's memory depends on.

    The run's settings, on which it depends too, are given to each method.

    Attributes:
        costs: FLOPs of the layers, which divide them into pipeline stages.
        layouts: bytes of block layouts.
        impl: what computes the loss and SwiGLU.
    """

    hybrid: HybridLayout
    hardware: Hardware
    costs: LayerFlops
    layouts: int
    impl: Implementations

    def memory(self, cfg: PretrainConfig, world_size: int) -> Memory:
        """Estimate the memory of the fullest rank."""
        stages = pipeline_stages(cfg.model, cfg.parallel, self.costs)
        return rank_memory(cfg, self.hybrid, world_size, stages, self.layouts, self.hardware.kind, self.impl)

    def total_if_divisible(self, cfg: PretrainConfig, world_size: int) -> int | None:
        """Return the fullest rank's bytes; None if the run can't be divided."""
        try:
            check_division(cfg, world_size)
        except ConfigError:
            return None
        return self.memory(cfg, world_size).total
