"""Finds the smallest change of settings that fits in memory."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from s2train.attention.teacher import teacher_setting
from s2train.config import PretrainConfig
from s2train.environment.liger import WITHOUT_TP
from s2train.errors import as_typed
from s2train.planning.advice import RECOMPUTE
from s2train.planning.memory_budget import MemoryBudget

_LARGEST_WORLD = 4096  # processes


def memory_remedy(cfg: PretrainConfig, world_size: int, budget: MemoryBudget) -> str:
    """Suggest settings that fit on these processes, or else on more."""
    # On a CPU, more processes would share the same memory.
    largest = world_size if budget.hardware.kind == "cpu" else _LARGEST_WORLD
    world = world_size
    while world <= largest:
        for changes, candidate in _candidates(cfg):
            if _fits(candidate, world, budget):
                settings = f"Set {' '.join(changes)}" if changes else "Run it"
                return f"{settings}{f' on {world} processes' if world > world_size else ''}."
        world *= 2
    return "Use a smaller model (+model=…), a shorter train.seq_length or a device with more memory."


def _candidates(cfg: PretrainConfig) -> Iterator[tuple[list[str], PretrainConfig]]:
    """Yield changes and configurations to try, those that cost least speed first."""
    train, parallel = cfg.train, cfg.parallel
    recomputes = RECOMPUTE[RECOMPUTE.index(train.recompute) :]
    micros = [train.micro_batch_size >> i for i in range(train.micro_batch_size.bit_length())]
    # More ranks than KV heads gather the QKV projection: suggested only to runs that do so already.
    most = max(parallel.tp, cfg.model.num_query_groups)
    tps = [tp for tp in (parallel.tp * 2**i for i in range(4)) if tp <= most]
    pps = [parallel.pp * 2**i for i in range(4)]
    distributed = parallel.distributed_optimizer or cfg.optim.name == "adam"  # the others' state is not divided
    # Outermost loop first: splitting the model costs most speed, then recomputation, then smaller micro batches.
    splits = sorted(itertools.product(pps, tps), key=lambda split: (split[0] * split[1], split[0]))
    for (pp, tp), recompute, micro in itertools.product(splits, recomputes, micros):
        wanted = {
            "train.micro_batch_size": (train.micro_batch_size, micro),
            "train.recompute": (train.recompute, recompute),
            "parallel.tp": (parallel.tp, tp),
            "parallel.sequence_parallel": (parallel.sequence_parallel, tp > 1),
            "parallel.pp": (parallel.pp, pp),
            "parallel.distributed_optimizer": (parallel.distributed_optimizer, distributed),
        }
        changes = [f"{name}={as_typed(new)}" for name, (old, new) in wanted.items() if old != new]
        yield (
            changes,
            replace(
                cfg,
                train=replace(train, micro_batch_size=micro, recompute=recompute),
                parallel=replace(parallel, tp=tp, pp=pp, sequence_parallel=tp > 1, distributed_optimizer=distributed),
            ),
        )


def _fits(cfg: PretrainConfig, world_size: int, budget: MemoryBudget) -> bool:
    if cfg.loss in WITHOUT_TP and cfg.parallel.tp > 1:
        return False
    if cfg.parallel.pp > 1 and teacher_setting(budget.hybrid.layers) is not None:
        return False
    total = budget.total_if_divisible(cfg, world_size)
    return total is not None and total <= budget.hardware.memory
