"""Attention under context parallel in separate processes, and the same attention in one process."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from s2train.kernels import BlockLayout, block_sparse_attention
from s2train.kernels.relative_error import relative_error
from torch import Tensor

from s2train.config import PatternConfig
from s2train.megatron.context_parallel.all_gather import own_rows
from s2train.megatron.context_parallel.attention import attend_after_exchange, attend_overlapped
from s2train.megatron.context_parallel.exchange_plan import exchanged_blocks
from tests.layouts.layout_cases import make_hybrid

NAMES = ("out", "dq", "dk", "dv")
BLOCK, DIM, BATCH = 16, 8, 2
WAYS = {"blocks": attend_after_exchange, "overlapped": attend_overlapped}


@dataclass(frozen=True)
class Case:
    """Heads and what they keep; `make_hybrid`'s arguments, or "random": any pairs, those after the query too."""

    heads: int
    kv_heads: int
    layout: dict[str, Any] | str

    def make(self, num_blocks: int) -> BlockLayout:
        if isinstance(self.layout, str):
            mask = torch.rand(self.heads, num_blocks, num_blocks) < 0.3
            mask |= torch.eye(num_blocks, dtype=torch.bool)
            return BlockLayout.from_mask(mask, BLOCK)
        sizes = {"num_heads": self.heads, "num_query_groups": self.kv_heads, "block_size": BLOCK}
        return make_hybrid("S", num_layers=1, **sizes, **self.layout).layers[0].block_layout(num_blocks * BLOCK)


CASES = {
    "shifted": Case(6, 2, {"stride": 5}),
    "grouped": Case(6, 3, {"kind": "grouped", "stride": 3, "local": 1}),
    "ranges": Case(5, 5, {"pattern": PatternConfig("ranges", ranges=[[2, 1], [6, 2], [None, 6]])}),
    "sinks": Case(3, 1, {"pattern": PatternConfig("sliding_window", window=2, sinks=1)}),
    "window": Case(4, 2, {"pattern": PatternConfig("sliding_window", window=1)}),  # no block leaves its rank
    "dense heads": Case(6, 2, {"stride": 7, "dense_heads": 1}),
    "homogeneous": Case(2, 1, {"kind": "homogeneous", "stride": 4}),
    "random": Case(6, 3, "random"),
}


@dataclass(frozen=True)
class Result:
    """One rank's outcome.

    Attributes:
        error, allowed: largest relative error against float64 of `NAMES`; and that of one process in the same dtype.
        sent: bytes to each rank by the forward and by the backward.
        predicted: [source, destination] bytes of the forward, from the layout.
    """

    error: dict[str, float]
    allowed: dict[str, float]
    sent: list[list[int]]
    predicted: Tensor


def run(size: int, blocks_per_chunk: int, folder: Path) -> dict[tuple[str, str, torch.dtype], list[Result]]:
    """Every case by every way in float64 and bfloat16, on `size` processes; the ranks' results, in their order."""
    return on_ranks(partial(_measure, blocks_per_chunk), size, folder)


def _measure(blocks_per_chunk: int, size: int, seed: int) -> dict[tuple[str, str, torch.dtype], Result]:
    return {
        (name, way, dtype): _compare(name, way, dtype, 2 * size * blocks_per_chunk, seed)
        for name in CASES
        for way in WAYS
        for dtype in (torch.float64, torch.bfloat16)
    }


def on_ranks(measure: Callable[[int, int], dict[Any, Any]], size: int, folder: Path) -> dict[Any, list[Any]]:
    """Measure on `size` processes, given their number and a seed; the ranks' results, in their order."""
    seed = random.randrange(2**31)
    print("seed", seed)
    # Forks have all imported; starting ranks afresh takes longer than their work.
    arguments: dict[str, Any] = {"nprocs": size, "start_method": "fork"}
    torch.multiprocessing.start_processes(_rank, (measure, size, folder, seed), **arguments)
    of_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    return {key: [results[key] for results in of_rank] for key in of_rank[0]}


def _rank(rank: int, measure: Callable[[int, int], dict[Any, Any]], size: int, folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(measure(size, seed), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def _compare(name: str, way: str, dtype: torch.dtype, num_blocks: int, seed: int) -> Result:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(seed)
    case, length = CASES[name], num_blocks * BLOCK
    layout = case.make(num_blocks)
    # Keys are sent beside values of another dimension, here one that 16 bytes don't divide. In bfloat16 torch would
    # round less than with equal ones.
    value_dim = DIM - 3 if dtype == torch.float64 else DIM
    shapes = ((case.heads, DIM), (case.kv_heads, DIM), (case.kv_heads, value_dim), (case.heads, value_dim))
    inputs = [torch.randn(length, BATCH, *shape).to(dtype) for shape in shapes]

    mine = partial(own_rows, rank=rank, size=size)

    def whole(precise: torch.dtype) -> list[Tensor]:
        call = partial(block_sparse_attention, layout=layout, backend="torch")
        return [mine(x) for x in gradients(call, [x.to(precise) for x in inputs])]

    sent: list[list[int]] = []
    ours = gradients(partial(_exchanged, way, layout, sent), [mine(x) for x in inputs])
    exact, plain = whole(torch.float64), whole(dtype)

    block_bytes = BATCH * BLOCK * (DIM + value_dim) * dtype.itemsize
    predicted = exchanged_blocks(layout, case.kv_heads, size) * block_bytes
    return Result(errors(ours, exact), errors(plain, exact), sent, predicted)


def errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    return {name: relative_error(x, x64) for name, x, x64 in zip(NAMES, found, exact, strict=True)}


def gradients(attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


def _exchanged(way: str, layout: BlockLayout, sent: list[list[int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exchange, with every collective's bytes written down."""

    def op(
        q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, query_offset: int, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"query_offset": query_offset, "return_lse": return_lse}
        return block_sparse_attention(q, k, v, layout, backend="torch", **options)

    group = torch.distributed.group.WORLD
    assert group is not None
    exchange = torch.distributed.all_to_all_single
    if not hasattr(exchange, "sent"):

        def counted(output: Tensor, source: Tensor, received: list[int], counts: list[int], **options: Any) -> Any:
            row = source[:1].nbytes if len(source) else 0
            counted.sent.append([count * row for count in counts])  # type: ignore[attr-defined]
            return exchange(output, source, received, counts, **options)

        torch.distributed.all_to_all_single = counted
    torch.distributed.all_to_all_single.sent = sent
    return WAYS[way](op, q, k, v, layout, group)
