"""Compiles a run's kernels once on each machine.

The first rank of a machine compiles; the others read the disk caches of Triton and FlashAttention-4.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import cast

import torch
from megatron.core import parallel_state
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.attention.teacher import teacher_layout, teacher_setting
from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.kernels.attention import Backend, block_sparse_attention, resolve_backend
from s2train.kernels.dense_choice import Kind
from s2train.kernels.layout import BlockLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids
from s2train.megatron.dense_kernels import choose_kernels, run_dense, runs_sparse_op
from s2train.megatron.model import DTYPES
from s2train.megatron.specs import core_attention_class


def run_once_per_machine(action: Callable[[], None]) -> None:
    """Run `action` on each machine's local rank 0 while the others wait.

    Collective: call it on all ranks.
    """
    if os.environ["LOCAL_RANK"] == "0":
        action()
    torch.distributed.barrier()


def compile_kernels(cfg: PretrainConfig, hybrid: HybridLayout, device: torch.device) -> None:
    """Run what each distinct layer runs in a step, once.

    Forward and backward. Layers of a data-dependent kind run what their core attention's `compile_kernels` does, dense
    layers only what is compiled at its first call.

    Uses the shapes of the run's steps, and zeros, so that no random number is drawn. Covers all layers and all tensor
    parallel shares, since the machine's other ranks may have others than this one. Frees the memory that it took: call
    it before the model is built. Does nothing if the sparse op runs on torch.
    """
    backend = cast(Backend, cfg.attention_backend)
    if resolve_backend(backend, device) == "torch":
        return
    tp = cfg.parallel.tp
    heads, groups = cfg.model.num_attention_heads // tp, kv_heads_on_rank(cfg.model.num_query_groups, tp)
    layers = [*hybrid.layers, *(teacher_layout(hybrid).layers if teacher_setting(hybrid.layers) else ())]
    for layer in dict.fromkeys(layers):
        for rows, keys in _chunks(cfg.train.seq_length):
            inputs = _zeros(cfg, rows, keys, heads, groups, device)
            if not layer.is_static:
                core_attention_class(layer.kind).compile_kernels(
                    layer, *inputs, keys - rows, backend, cfg.data.attention_within_documents
                )
                continue
            for share in range(1 if layer.is_dense else tp):  # dense heads are alike
                own = slice(share * heads, (share + 1) * heads)
                layout = cache(partial(layer.block_layout, keys, heads=own, device=device))
                attend = partial(_attend_densely, cfg.dense_attention) if layer.is_dense else _attend
                if cfg.data.attention_within_documents:
                    # of one sequence, as layers do
                    bounds = torch.tensor([0, rows], dtype=torch.int32, device=device)
                    query, key, value = (x[:rows, :1] for x in inputs)
                    _run(attend(_Call(layout, query, key, value, bounds, backend)))
                if keys > rows or not cfg.data.attention_within_documents:
                    _run(attend(_Call(layout, *inputs, None, backend)))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _zeros(
    cfg: PretrainConfig, rows: int, keys: int, heads: int, groups: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the query, key and value of one call.

    They are leaves that require gradients, or views of such leaves.
    """
    batch, width, dtype = cfg.train.micro_batch_size, head_dim(cfg.model), DTYPES[cfg.train.precision]
    query = torch.zeros(rows, batch, heads, width, dtype=dtype, device=device, requires_grad=True)
    key = torch.zeros(keys, batch, groups, width, dtype=dtype, device=device, requires_grad=True)
    # A view of the projection's output, as in the layer: a kernel is compiled for given strides. Ranks that share a KV
    # head copy its values.
    projected = 1 if cfg.parallel.tp > cfg.model.num_query_groups else heads // groups + 2
    value = torch.zeros(keys, batch, groups, projected * width, dtype=dtype, device=device, requires_grad=True)
    return query, key, value[..., -width:]


@dataclass(frozen=True)
class _Call:
    """A layer's call, as in a step.

    `bounds`, int32 [documents + 1], are those of packed documents.
    """

    layout: Callable[[], BlockLayout]
    query: Tensor
    key: Tensor
    value: Tensor
    bounds: Tensor | None
    backend: Backend

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return len(self.key) - len(self.query)


def _attend(call: _Call) -> Tensor:
    return block_sparse_attention(
        call.query, call.key, call.value, call.layout(), query_offset=call.offset, cu_seqlens=call.bounds,
        backend=call.backend,
    )  # fmt: skip


def _attend_densely(implementation: str, call: _Call) -> Tensor | None:
    """Compute a dense layer's attention, as `_attend`.

    None if torch's own kernels do, which aren't compiled.
    """
    query, key, value, bounds = call.query, call.key, call.value, call.bounds
    offset, documents = call.offset, bounds is not None
    if query.is_cuda or implementation == "s2train":
        kind: Kind = "documents" if documents else "later" if offset else "whole"
        implementation = choose_kernels(
            kind, query, key, value, offset, bounds, implementation, call.backend, call.layout
        ).implementation
    by_op = runs_sparse_op(implementation, bounds)
    if not by_op and implementation != "fa4":
        return None
    layout, scale = call.layout() if by_op else None, query.shape[-1] ** -0.5
    return run_dense(implementation, query, key, value, layout, scale, offset, bounds, call.backend)


def _run(out: Tensor | None) -> None:
    if out is not None:
        out.backward(torch.ones_like(out))


def _chunks(seq_length: int) -> list[tuple[int, int]]:
    """(query rows, visible keys) of each of this rank's calls.

    Under context parallelism there is one call for each of its chunks.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return [(seq_length, seq_length)]
    rows = seq_length // (2 * size)
    return [(rows, (chunk + 1) * rows) for chunk in chunk_ids(parallel_state.get_context_parallel_rank(), size)]
