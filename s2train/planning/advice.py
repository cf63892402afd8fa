"""Suggests faster settings that a fitting plan has memory for."""

from dataclasses import replace

from s2train.attention.hybrid import HybridLayout
from s2train.config import PretrainConfig
from s2train.costs.implementations import Implementations
from s2train.costs.memory import GIB, rank_memory
from s2train.costs.stages import LayerFlops, pipeline_stages
from s2train.environment.hardware import Hardware
from s2train.errors import ConfigError
from s2train.validation.division import check_division

_ROOM = 0.9  # share of a device's memory: predictions are within 10 %
_RECOMPUTE = ("none", "selective", "full")  # fastest first


def memory_advice(
    cfg: PretrainConfig,
    hybrid: HybridLayout,
    world_size: int,
    hardware: Hardware,
    costs: LayerFlops,
    layouts: int,
    impl: Implementations,
) -> str | None:
    """Suggest less recomputation or a larger micro batch that fits, or None.

    Args:
        layouts: bytes of block layouts.
    """
    if hardware.kind != "cuda":
        return None
    stages = pipeline_stages(cfg.model, cfg.parallel, costs)

    def total_of(changed: PretrainConfig) -> int:
        return rank_memory(changed, hybrid, world_size, stages, layouts, hardware.kind, impl).total

    found = []
    for recompute in _RECOMPUTE[: _RECOMPUTE.index(cfg.train.recompute)]:
        changed = replace(cfg, train=replace(cfg.train, recompute=recompute))
        if (total := total_of(changed)) <= _ROOM * hardware.memory:
            found.append(f"train.recompute={recompute} ({total / GIB:.1f} GiB)")
            break
    best, micro = None, 2 * cfg.train.micro_batch_size
    while micro <= cfg.train.global_batch_size:
        changed = replace(cfg, train=replace(cfg.train, micro_batch_size=micro))
        total = total_of(changed)
        if not _divides(changed, world_size) or total > _ROOM * hardware.memory:
            break
        best, micro = f"train.micro_batch_size={micro} ({total / GIB:.1f} GiB)", 2 * micro
    found += [best] if best else []
    return f"for {' or '.join(found)}" if found else None


def _divides(cfg: PretrainConfig, world_size: int) -> bool:
    try:
        check_division(cfg, world_size)
    except ConfigError:
        return False
    return True
