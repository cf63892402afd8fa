"""Measures context parallel traffic and time against gathering all keys.

Run it with torchrun on all devices:

`python -m torch.distributed.run --nproc-per-node N -m s2train.scaling.exchange OUTPUT.json RECORDED.json`
"""

import argparse
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from s2train.config import ParallelConfig
from s2train.costs.attention import density
from s2train.distributed.agreement import over_ranks
from s2train.environment.hardware_queues import order_communication
from s2train.files import write_json
from s2train.kernels.benchmarks.timing import Clock
from s2train.megatron import setup
from s2train.megatron.context_parallel.all_gather import chunk_ids, gather_sequence
from s2train.megatron.context_parallel.attention import rank_exchange_plan
from s2train.megatron.context_parallel.exchange_plan import exchanged_blocks, gathered_blocks
from s2train.megatron.context_parallel.kv_exchange import KVExchange
from s2train.scaling.cases import Case, Shape
from s2train.scaling.exchange_modes import exchange_modes
from s2train.scaling.recorded import Recorded
from s2train.scaling.timing import time_attention, time_call

# At 128k tokens these keep from 3 to 28 % of the causal positions. Heads of a KV group keep different columns (shifted,
# whose union is several times larger) or the same columns (grouped).
CASES = tuple(
    Case(128, local, stride, schedule)
    for local, stride in ((8, 64), (8, 16), (8, 8), (16, 4))
    for schedule in ("shifted", "grouped")
) + tuple(Case(128, 8, stride, "shifted") for stride in (12, 10))  # 26 and 31 % of the bytes, about `AUTO_LIMIT`


def measure(case: Case, shape: Shape, device: torch.device, passes: int) -> dict[str, Any]:
    """Measure bytes and ms of one layer on each rank.

    Bytes are those of a forward; a backward moves the same number.
    """
    group = parallel_state.get_context_parallel_group()
    rank, size = group.rank(), group.size()
    layer, clock = case.layer(shape), Clock(device)
    layout = layer.block_layout(shape.length, device=device)
    began = time.perf_counter()
    plan = rank_exchange_plan(layout, shape.kv_heads, group)
    clock.wait()
    seconds = time.perf_counter() - began
    rows = shape.length // size
    q, k, v, dout = shape.inputs(rows, rows, shape.heads, shape.kv_heads, device)
    block_bytes = case.block * 2 * shape.dim * k.element_size()

    def exchange() -> None:
        started = KVExchange(plan, case.block, group)
        started.receive(*started.send(k, v), before_own=True)

    mine = {
        "setup_s": seconds,
        "exchange_ms": time_call(exchange, clock, passes),
        "gather_ms": time_call(lambda: (gather_sequence(k, group), gather_sequence(v, group)), clock, passes),
        "attention_ms": {
            name: time_attention(partial(attend, q, k, v), (q, k, v), dout, clock, passes)
            for name, attend in exchange_modes(layout, group).items()
        },
        "sent_bytes": sum(plan.sent_counts) * block_bytes,
        "gradients_bytes": sum(plan.received) * block_bytes,
        "chunks": chunk_ids(rank, size),
    }
    predicted = exchanged_blocks(layout, shape.kv_heads, size).cpu()
    gathered = gathered_blocks(layout, shape.kv_heads, size).cpu()
    return {
        "case": case.name,
        "density": density(layer, shape.length),
        "predicted_bytes": (predicted * block_bytes).tolist(),
        "gathered_bytes": (gathered * block_bytes).tolist(),
        "share_of_gathering": float(predicted.sum() / gathered.sum()),
        "ranks": over_ranks(mine),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("recorded", type=Path, help="file of measured cases, which are not measured again")
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    parallel = ParallelConfig(cp=int(os.environ["WORLD_SIZE"]))
    order_communication(parallel)  # as in a training run
    device = setup.initialize(parallel, seed=1)
    shape, recorded = Shape(given.length), Recorded(given.recorded)
    results = [
        recorded.on_all_ranks(f"cp bytes {case.name}", partial(measure, case, shape, device, given.passes))
        for case in CASES
    ]
    if torch.distributed.get_rank() == 0:
        write_json(given.output, {"length": given.length, "cases": results})
    setup.shutdown()


if __name__ == "__main__":
    main()
