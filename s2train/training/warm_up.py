"""Compiles a run's kernels once on each machine.

The first rank of a machine compiles; the others read the disk caches of Triton and FlashAttention-4. In a cold start
other processes compile parts before it (`s2train.training.compilers`), without Megatron's imports.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, cast

import torch
from torch import Tensor

from s2train.attention.hybrid import HybridLayout
from s2train.attention.kind import LayerLayout
from s2train.attention.teacher import teacher_layout, teacher_setting
from s2train.attention.weights import kv_heads_on_rank
from s2train.config import PretrainConfig, head_dim
from s2train.environment.dtypes import DTYPES
from s2train.kernels.attention import Backend, block_sparse_attention, resolve_backend
from s2train.kernels.backward_alone import forwards_left_out
from s2train.kernels.layout import BlockLayout
from s2train.megatron.dense_kernels import CallInputs, choose_kernels, run_dense, runs_sparse_op


@dataclass(frozen=True)
class Part:
    """Kernels that one process compiles: of some layers, in one direction."""

    layers: Literal["static", "sparse", "dense", "data-dependent"]
    direction: Literal["forward", "backward", "passes"]  # passes: both

    def __str__(self) -> str:
        """Format as "dense backward"."""
        return f"{self.layers} {self.direction}"

    def holds(self, layer: LayerLayout) -> bool:
        """Whether a layer is in the part."""
        if not layer.is_static:
            return self.layers == "data-dependent"
        return self.layers in ("static", "dense" if layer.is_dense else "sparse")


def run_once_per_machine(action: Callable[[], None]) -> None:
    """Run `action` on each machine's local rank 0 while the others wait.

    Collective: call it on all ranks.
    """
    if os.environ["LOCAL_RANK"] == "0":
        action()
    torch.distributed.barrier()


def compile_kernels(
    cfg: PretrainConfig, hybrid: HybridLayout, device: torch.device, cp_rank: int, part: Part | None = None
) -> None:
    """Run what each distinct layer runs in a step, once.

    Forward and backward. Layers of a data-dependent kind run what their core attention's `compile_kernels` does, dense
    layers only what is compiled at its first call.

    Uses the shapes of the run's steps, and zeros, so that no random number is drawn. Covers all layers and all tensor
    parallel shares, since the machine's other ranks may have others than this one. Frees the memory that it took: call
    it before the model is built. Does nothing if the sparse op runs on torch.

    Args:
        cp_rank: context parallel rank.
        part: what to run; None: everything. Layers of a data-dependent kind run in passes only.
    """
    backend = cast(Backend, cfg.attention_backend)
    if resolve_backend(backend, device) == "torch":
        return
    tp = cfg.parallel.tp
    heads, groups = cfg.model.num_attention_heads // tp, kv_heads_on_rank(cfg.model.num_query_groups, tp)
    layers = [*hybrid.layers, *(teacher_layout(hybrid).layers if teacher_setting(hybrid.layers) else ())]
    direction = "passes" if part is None else part.direction
    run = _no_backward if direction == "forward" else _run
    with forwards_left_out() if direction == "backward" else nullcontext():
        for layer in dict.fromkeys(layer for layer in layers if part is None or part.holds(layer)):
            for rows, keys in _chunks(cfg.train.seq_length, cfg.parallel.cp, cp_rank):
                inputs = _zeros(cfg, rows, keys, heads, groups, device)
                if layer.is_static:
                    for call in _calls(cfg, layer, inputs, backend):
                        run(_attend_densely(cfg.dense_attention, call) if layer.is_dense else _attend(call))
                else:
                    from s2train.megatron.specs import core_attention_class  # imports Megatron

                    core_attention_class(layer.kind).compile_kernels(
                        layer, *inputs, keys - rows, backend, cfg.data.attention_within_documents
                    )
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
    # A view of the projection's output, as in the layer: a kernel is compiled for given strides. Ranks that share KV
    # heads copy its values. Context parallel ranks attend to copies of others' values: as a view, those of a million
    # tokens and their gradient would take 26 GB in a 7B layer, with more elements than 32 bits index.
    copied = cfg.parallel.tp > cfg.model.num_query_groups or cfg.parallel.cp > 1
    projected = 1 if copied else heads // groups + 2
    value = torch.zeros(keys, batch, groups, projected * width, dtype=dtype, device=device, requires_grad=True)
    return query, key, value[..., -width:]


@dataclass(frozen=True)
class _Call:
    """A layer's call, as in a step."""

    layout: Callable[[], BlockLayout]
    inputs: CallInputs
    backend: Backend


def _calls(
    cfg: PretrainConfig, layer: LayerLayout, inputs: tuple[Tensor, Tensor, Tensor], backend: Backend
) -> Iterator[_Call]:
    """Yield a static layer's calls of every tensor parallel share."""
    (rows, _, heads, _), keys, device = inputs[0].shape, len(inputs[1]), inputs[0].device
    for share in range(1 if layer.is_dense else cfg.parallel.tp):  # dense heads are alike
        own = slice(share * heads, (share + 1) * heads)
        layout = cache(partial(layer.block_layout, keys, heads=own, device=device))
        if cfg.data.attention_within_documents:
            # of one sequence, as layers do
            bounds = torch.tensor([0, rows], dtype=torch.int32, device=device)
            query, key, value = (x[:rows, :1] for x in inputs)
            yield _Call(layout, CallInputs(query, key, value, bounds), backend)
        if keys > rows or not cfg.data.attention_within_documents:
            yield _Call(layout, CallInputs(*inputs), backend)


def _attend(call: _Call) -> Tensor:
    inputs = call.inputs
    return block_sparse_attention(
        inputs.query, inputs.key, inputs.value, call.layout(), query_offset=inputs.query_offset,
        cu_seqlens=inputs.bounds, backend=call.backend,
    )  # fmt: skip


def _attend_densely(implementation: str, call: _Call) -> Tensor | None:
    """Compute a dense layer's attention, as `_attend`.

    None if torch's own kernels do, which aren't compiled.
    """
    inputs = call.inputs
    if inputs.query.is_cuda or implementation == "s2train":
        implementation = choose_kernels(inputs, implementation, call.backend, call.layout).implementation
    by_op = runs_sparse_op(implementation, inputs.bounds)
    if not by_op and implementation != "fa4":
        return None
    layout, scale = call.layout() if by_op else None, inputs.query.shape[-1] ** -0.5
    return run_dense(inputs, implementation, layout, scale, call.backend)


def _run(out: Tensor | None) -> None:
    if out is not None:
        out.backward(torch.ones_like(out))


def _no_backward(out: Tensor | None) -> None:
    pass


def _chunks(seq_length: int, size: int, rank: int) -> list[tuple[int, int]]:
    """(query rows, visible keys) of each of a context parallel rank's calls.

    With several ranks there is one call for each of its chunks.
    """
    if size == 1:
        return [(seq_length, seq_length)]
    from s2train.megatron.context_parallel.all_gather import chunk_ids  # imports Megatron

    rows = seq_length // (2 * size)
    return [(rows, (chunk + 1) * rows) for chunk in chunk_ids(rank, size)]
