"""Attention within documents under context parallel in separate processes, and the same in one process."""

import random
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from s2train.kernels import BlockLayout, block_sparse_attention
from torch import Tensor

from s2train.megatron import cpu
from s2train.megatron.context_parallel.all_gather import chunk_ids, own_rows
from s2train.megatron.context_parallel.document_exchange import attend_documents_exchanged
from s2train.megatron.context_parallel.documents import (
    DividedDocuments,
    attend_documents_gathered,
    divided_documents,
)
from tests.megatron.cp_processes import BLOCK, CASES, DIM, errors, gradients, on_ranks

WAYS = ("gather", "blocks", "overlapped")
BLOCKS_PER_CHUNK = 3
LAYOUTS = ("shifted", "grouped", "random")


def random_bounds(length: int) -> list[int]:
    """Of documents of any lengths, some of a single token."""
    cuts = {random.randrange(1, length) for _ in range(random.randrange(1, 7))}
    return sorted({0, *cuts, *(cut + 1 for cut in random.sample(sorted(cuts), 1)), length})


def make_documents(size: int) -> dict[str, Tensor]:
    """Bounds of two sequences for each case: int32 [2, documents + 1]."""
    rows = BLOCKS_PER_CHUNK * BLOCK
    length = 2 * size * rows
    aligned = list(range(0, length + 1, rows))
    cases = {
        "any": [random_bounds(length), random_bounds(length)],
        "whole sequences": [[0, length], [0, length]],
        "chunks, and one more token": [aligned, [0, *(bound + 1 for bound in aligned[:-1]), length]],
        "one over most chunks": [[0, 5, length - 7, length], [0, rows - 1, length]],
    }
    return {name: _padded(bounds, length) for name, bounds in cases.items()}


def _padded(bounds: list[list[int]], length: int) -> Tensor:
    most = max(map(len, bounds))
    return torch.tensor([row + [length] * (most - len(row)) for row in bounds], dtype=torch.int32)


@dataclass(frozen=True)
class Result:
    """One rank's largest relative errors of `NAMES` against float64, and those of one process in the same dtype."""

    error: dict[str, float]
    allowed: dict[str, float]


def run(size: int, folder: Path) -> dict[tuple[str, str, str, torch.dtype], list[Result]]:
    """Results of all ranks by layout, documents, way and dtype."""
    return on_ranks(_measure, size, folder)


def _measure(size: int, seed: int) -> dict[tuple[str, str, str, torch.dtype], Result]:
    cpu.install()
    random.seed(seed)
    torch.manual_seed(seed)
    results = {}
    for name in LAYOUTS:
        layout = CASES[name].make(2 * size * BLOCKS_PER_CHUNK)
        for documents, bounds in make_documents(size).items():
            for dtype in (torch.float64, torch.float32) if documents == "any" else (torch.float64,):
                for way, result in _compare(layout, CASES[name].kv_heads, bounds, dtype).items():
                    results[name, documents, way, dtype] = result
    return results


def _compare(layout: BlockLayout, kv_heads: int, bounds: Tensor, dtype: torch.dtype) -> dict[str, Result]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    length, heads = int(bounds[0, -1]), layout.num_heads
    counts = (heads, kv_heads, kv_heads, heads)
    inputs = [torch.randn(length, len(bounds), count, DIM).to(dtype) for count in counts]

    mine = partial(own_rows, rank=rank, size=size)

    def whole(precise: torch.dtype) -> list[Tensor]:
        found = gradients(partial(one_process, layout, bounds), [x.to(precise) for x in inputs])
        return [mine(x) for x in found]

    exact, plain = whole(torch.float64), whole(dtype)

    results = {}
    for way in WAYS:
        documents = divided_documents(bounds, length, rank, size, "cpu")
        found = gradients(partial(_divided, way, layout, documents), [mine(x) for x in inputs])
        results[way] = Result(errors(found, exact), errors(plain, exact))
    return results


def one_process(layout: BlockLayout, bounds: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each document of each sequence alone."""
    columns = []
    for sequence, row in enumerate(bounds.tolist()):
        parts = [
            block_sparse_attention(*(x[a:b, sequence : sequence + 1] for x in (q, k, v)), layout, backend="torch")
            for a, b in pairwise(row)
            if a < b
        ]
        columns.append(torch.cat(parts))
    return torch.cat(columns, 1)


def _divided(way: str, layout: BlockLayout, documents: DividedDocuments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = torch.distributed.group.WORLD
    assert group is not None

    def within(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, layout, cu_seqlens=bounds, backend="torch")

    def later(q: Tensor, k: Tensor, v: Tensor, offset: int) -> Tensor:
        own_layout = documents.later_layout(layout, offset, len(q))
        return block_sparse_attention(q, k, v, own_layout, query_offset=offset, backend="torch")

    def op(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, query_offset: int, return_lse: bool) -> Tensor:
        assert not return_lse
        return block_sparse_attention(q, k, v, layout, query_offset=query_offset, backend="torch")

    if way == "gather":
        return attend_documents_gathered(later, within, q, k, v, documents, group)
    overlapped = way == "overlapped"
    return attend_documents_exchanged(op, within, q, k, v, layout, documents, group, overlapped=overlapped)


def brute_force_tokens(layout: BlockLayout, kv_heads: int, bounds: Tensor, size: int) -> np.ndarray:
    """Tokens of KV heads that each rank's chunks need from before them: int64 [receiver, sender]."""
    mask = layout.mask().tril()
    counts = np.zeros((size, size), np.int64)
    rows = int(bounds[0, -1]) // (2 * size)
    for receiver in range(size):
        for chunk in chunk_ids(receiver, size):
            for row in bounds.tolist():
                first = max(bound for bound in row if bound <= chunk * rows)
                stop = min(min(bound for bound in row if bound > chunk * rows), (chunk + 1) * rows)
                queries = torch.arange(chunk * rows, stop) if first < chunk * rows else torch.arange(0)
                of_queries = mask[:, ((queries - first) // BLOCK).unique()].any(1).view(kv_heads, -1, mask.shape[-1])
                for token in range(first, chunk * rows):
                    block = (token - first) // BLOCK
                    own = len(queries) > 0 and block == (chunk * rows - first) // BLOCK
                    needed = kv_heads if own else int(of_queries.any(1)[:, block].sum())
                    other = token // rows
                    counts[receiver, min(other, 2 * size - 1 - other)] += needed
    return counts
