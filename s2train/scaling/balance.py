"""Measures how evenly attention time is divided among ranks.

Run it with torchrun, which times the compared ranks on its devices. Tensor parallel: heads of different density, as
listed and as placed by `schedule.placement=balanced`. Context parallel: contiguous rows per rank, and zig-zag rows.

`python -m torch.distributed.run --nproc-per-node N -m s2train.scaling.balance OUTPUT.json RECORDED.json`
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2train.attention.kind import LayerLayout
from s2train.attention.registry import LETTERS
from s2train.config import ParallelConfig
from s2train.distributed.agreement import over_ranks
from s2train.files import write_json
from s2train.kernels.attention import block_sparse_attention
from s2train.kernels.benchmarks.timing import Clock
from s2train.layouts.patterns import Dense, LocalVertical, Pattern
from s2train.layouts.placement import place_balanced
from s2train.megatron import setup
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.context_parallel.exchange_plan import exchange_plan
from s2train.scaling.cases import SIZES, Case, Shape
from s2train.scaling.recorded import Recorded
from s2train.scaling.timing import time_attention

BLOCK = 128
_Measured = tuple[Callable[[], Tensor], tuple[Tensor, ...], Tensor]


def uneven_heads(shape: Shape) -> dict[str, tuple[Pattern, ...]]:
    """Make layers whose first heads keep most.

    In one, a quarter of the KV groups is dense; in the other, windows shrink from group to group.
    """
    groups, size = shape.kv_heads, shape.heads // shape.kv_heads
    sparse = [LocalVertical(local=8, stride=16, offset=group) for group in range(groups)]
    some_dense = [Dense() if group < groups // 4 else sparse[group] for group in range(groups)]
    windows = [LocalVertical(local=8 * (groups - group), stride=16, offset=group) for group in range(groups)]
    named: dict[str, list[Pattern]] = {"dense groups": list(some_dense), "windows": list(windows)}
    return {name: tuple(p for p in patterns for _ in range(size)) for name, patterns in named.items()}


def spread(times: list[float]) -> float:
    """Relative excess of the slowest rank's time over the mean.

    The other ranks lose it waiting.
    """
    return max(times) * len(times) / sum(times) - 1


class Meter:
    """Times the ranks of groups of any size on the available devices."""

    def __init__(self, shape: Shape, device: torch.device, passes: int) -> None:
        self.shape, self.device, self._passes, self._clock = shape, device, passes, Clock(device)

    def times(self, size: int, problem: Callable[[int], _Measured]) -> dict[str, Any]:
        """Measure forward and backward of each of `size` ranks.

        Returns ms and their spread.
        """
        world, own = torch.distributed.get_world_size(), torch.distributed.get_rank()
        mine: dict[int, dict[str, float]] = {}
        for rank in range(own, size, world):
            forward, inputs, dout = problem(rank)
            mine[rank] = time_attention(forward, inputs, dout, self._clock, self._passes)
        found = {rank: ms for part in over_ranks(mine) for rank, ms in part.items()}
        both = [found[rank]["forward"] + found[rank]["backward"] for rank in range(size)]
        return {"ms": [found[rank] for rank in range(size)], "spread": spread(both)}

    def heads(self, layer: LayerLayout, size: int, rank: int) -> _Measured:
        """Attention of a tensor parallel rank's heads."""
        shape, count = self.shape, self.shape.heads // size
        layout = layer.block_layout(shape.length, heads=slice(rank * count, (rank + 1) * count), device=self.device)
        *inputs, dout = shape.inputs(shape.length, shape.length, count, shape.kv_heads // size, self.device)
        return partial(block_sparse_attention, *inputs, layout), tuple(inputs), dout

    def contiguous_rows(self, layer: LayerLayout, size: int, rank: int) -> _Measured:
        """Attention of a context parallel rank with contiguous rows."""
        shape, rows = self.shape, self.shape.length // size
        layout = layer.block_layout(shape.length, device=self.device)
        *inputs, dout = shape.inputs(rows, rows * (rank + 1), shape.heads, shape.kv_heads, self.device)
        return partial(block_sparse_attention, *inputs, layout, query_offset=rows * rank), tuple(inputs), dout

    def zigzag_rows(self, layer: LayerLayout, size: int, rank: int) -> _Measured:
        """Attention of a context parallel rank with two zig-zag chunks.

        Attends over received and own keys.
        """
        shape, rows = self.shape, self.shape.length // size
        layout = layer.block_layout(shape.length, device=self.device)
        plan = exchange_plan(layout, shape.kv_heads, rank, size)
        offset = plan.slots * layout.block_size
        *inputs, dout = shape.inputs(rows, rows + offset, shape.heads, shape.kv_heads, self.device)
        return partial(block_sparse_attention, *inputs, plan.whole(layout), query_offset=offset), tuple(inputs), dout


def balance(meter: Meter, recorded: Recorded) -> dict[str, Any]:
    """Measure times and spreads of both parallelisms, for groups of `SIZES`."""
    tensor: dict[str, Any] = {}
    for name, heads in uneven_heads(meter.shape).items():
        listed = LayerLayout(LETTERS["S"], heads, BLOCK)
        placed = replace(listed, bound=place_balanced(heads, meter.shape.kv_heads))
        for size in SIZES:
            before, after = (partial(meter.heads, layer, size) for layer in (listed, placed))
            tensor[f"{name} tp{size}"] = recorded.on_all_ranks(
                f"balance {name} tp{size}", partial(_compare, meter, size, before, after)
            )
    layers = {
        case.name: case.layer(meter.shape) for case in (Case(BLOCK, 8, 16, "grouped"), Case(BLOCK, 8, 8, "shifted"))
    }
    context: dict[str, Any] = {}
    for name, layer in layers.items():
        for size in SIZES:
            before, after = partial(meter.contiguous_rows, layer, size), partial(meter.zigzag_rows, layer, size)
            found = recorded.on_all_ranks(f"balance {name} cp{size}", partial(_compare, meter, size, before, after))
            context[f"{name} cp{size}"] = found | {"chunks": [chunk_ids(rank, size) for rank in range(size)]}
    return {"length": meter.shape.length, "tensor_parallel": tensor, "context_parallel": context}


def _compare(
    meter: Meter, size: int, before: Callable[[int], _Measured], after: Callable[[int], _Measured]
) -> dict[str, Any]:
    return {"before": meter.times(size, before), "after": meter.times(size, after)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("recorded", type=Path, help="file of measured cases, which are not measured again")
    parser.add_argument("--length", type=int, default=32_768)
    parser.add_argument("--passes", type=int, default=5)
    given = parser.parse_args()
    device = setup.initialize(ParallelConfig(), seed=1)
    result = balance(Meter(Shape(given.length), device, given.passes), Recorded(given.recorded))
    if torch.distributed.get_rank() == 0:
        write_json(given.output, result)
    setup.shutdown()


if __name__ == "__main__":
    main()
