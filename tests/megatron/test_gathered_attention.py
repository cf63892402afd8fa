"""Attention over gathered keys gives the bits of slices of the gathered sequence, and what one process gives."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from s2train.megatron import cpu
from s2train.megatron.context_parallel.all_gather import chunk_ids, gather_sequence, own_rows
from s2train.megatron.context_parallel.attention import attend_gathered

ROWS, BATCH, HEADS, DIM = 5, 2, 2, 4  # rows of a chunk


def attend(query: Tensor, key: Tensor, value: Tensor, query_offset: int) -> Tensor:
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key)
    seen = torch.arange(len(key)) <= torch.arange(query_offset, query_offset + len(query))[:, None]
    return torch.einsum("bhqk,kbhd->qbhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def attend_slices(query: Tensor, key: Tensor, value: Tensor, group: Any) -> Tensor:
    key, value = gather_sequence(key, group), gather_sequence(value, group)
    pairs = zip(chunk_ids(group.rank(), group.size()), query.chunk(2), strict=True)
    ends = [((chunk + 1) * ROWS, part) for chunk, part in pairs]
    return torch.cat([attend(part, key[:end], value[:end], end - ROWS) for end, part in ends])


def results(call: Any, inputs: list[Tensor]) -> list[Tensor]:
    *leaves, dout = (x.detach().clone() for x in inputs)
    out = call(*(leaf.requires_grad_() for leaf in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def rank_program(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    cpu.install()
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    group = torch.distributed.group.WORLD
    found = {}
    for dtype in (torch.float64, torch.bfloat16):
        torch.manual_seed(1)  # the same inputs on every rank
        whole = [torch.randn(2 * size * ROWS, BATCH, HEADS, DIM, dtype=dtype) for _ in range(4)]
        mine = partial(own_rows, rank=rank, size=size)
        inputs = [mine(x) for x in whole]
        ways = {
            "ours": results(partial(attend_gathered, attend, group=group), inputs),
            "slices": results(partial(attend_slices, group=group), inputs),
            "one": [mine(x) for x in results(partial(attend, query_offset=0), whole)],
        }
        found[dtype] = ways
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_of_both_chunks_are_added(size: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(rank_program, (size, tmp_path), nprocs=size, start_method="fork")
    for rank in range(size):
        found = torch.load(tmp_path / f"{rank}.pt")
        for ways in found.values():
            assert all(x.equal(y) for x, y in zip(ways["ours"], ways["slices"], strict=True))
        for x, y in zip(found[torch.float64]["ours"], found[torch.float64]["one"], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
