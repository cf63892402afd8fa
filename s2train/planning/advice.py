"""Suggests faster settings that a fitting plan has memory for."""

from dataclasses import replace

from s2train.config import PretrainConfig
from s2train.costs.memory import GIB
from s2train.planning.memory_budget import MemoryBudget

ROOM = 0.9  # share of a device's memory to plan for: predictions are within 10 %, and memory fragments
RECOMPUTE = ("none", "selective", "mlp", "full")  # those that save more memory later


def memory_advice(cfg: PretrainConfig, world_size: int, budget: MemoryBudget) -> str | None:
    """Suggest less recomputation or a larger micro batch that fits, or None."""
    if budget.hardware.kind != "cuda":
        return None
    room = ROOM * budget.hardware.memory
    found = []
    for recompute in RECOMPUTE[: RECOMPUTE.index(cfg.train.recompute)]:
        changed = replace(cfg, train=replace(cfg.train, recompute=recompute))
        if (total := budget.memory(changed, world_size).total) <= room:
            found.append(f"train.recompute={recompute} ({total / GIB:.1f} GiB)")
            break
    best, micro = None, 2 * cfg.train.micro_batch_size
    while micro <= cfg.train.global_batch_size:
        changed = replace(cfg, train=replace(cfg.train, micro_batch_size=micro))
        needed = budget.total_if_divisible(changed, world_size)
        if needed is None or needed > room:
            break
        best, micro = f"train.micro_batch_size={micro} ({needed / GIB:.1f} GiB)", 2 * micro
    found += [best] if best else []
    return f"for {' or '.join(found)}" if found else None
