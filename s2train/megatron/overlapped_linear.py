"""Linear layers that communicate by chunks of the sequence while they compute.

Megatron's layers with sequence parallelism wait for the whole gather before a column-parallel product, for the whole
reduce-scatter after a row-parallel one, and for the gather of its output's gradient. Here only one chunk of each is
waited for. Products and sums are the same, and so are weights, gradients and names in checkpoints.

Shapes: p ranks hold s / p positions of b sequences each. A chunk has M = s b / (p C) of a rank's rows, and the same of
every other rank's. Calls are made in the order in which the GPU has to start them
(`s2train.environment.hardware_queues`).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication, custom_fwd
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, Work

from s2train.megatron.gradient_sums import add_weight_gradient


def overlap_communication(model: torch.nn.Module, chunks: int) -> None:
    """Make a model's tensor parallel linear layers communicate in chunks.

    They are Megatron's, with sequence parallelism and without biases. `chunks` divides the positions of each rank.
    """
    for module in model.modules():
        if type(module) is ColumnParallelLinear:
            module.__class__ = ChunkedColumnLinear  # as Megatron's constructors have fixed classes
        elif type(module) is RowParallelLinear:
            module.__class__ = ChunkedRowLinear
        else:
            continue
        assert module.sequence_parallel
        assert module.bias is None
        module.chunks = chunks


class ChunkedColumnLinear(ColumnParallelLinear):
    """Column-parallel layer whose forward multiplies a chunk while the next is gathered.

    Megatron's backward overlaps its communication already.
    """

    chunks: int

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Multiply all ranks' inputs by this rank's weight [n, h].

        Inputs are [s / p, b, h], the output [s, b, n].
        """
        if _is_frozen(weight):
            frozen: Tensor = super()._forward_impl(input=input, weight=weight, **options)
            return frozen
        out: Tensor = _GatheredProduct.apply(
            input, weight, self.chunks, self.gradient_accumulation_fusion, self.tp_group
        )
        return out


class ChunkedRowLinear(RowParallelLinear):
    """Row-parallel layer that multiplies a chunk while others are communicated."""

    chunks: int

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Sum the ranks' products, and keep this rank's rows.

        Inputs are [s, b, k], weights [n, k], the output [s / p, b, n].
        """
        if _is_frozen(self.weight):
            out, _ = super().forward(input_)
        else:
            out = _ScatteredProduct.apply(
                input_, self.weight, self.chunks, self.gradient_accumulation_fusion, self.tp_group
            )
        return out, None


def _is_frozen(weight: Tensor) -> bool:
    """Whether a backward pass would skip the weight's gradient.

    Megatron has functions for that.
    """
    return torch.is_grad_enabled() and not weight.requires_grad


class _GatheredProduct(LinearWithGradAccumulationAndAsyncCommunication):
    """Megatron's product and backward, with another forward."""

    @staticmethod
    @custom_fwd
    def forward(ctx: Any, x: Tensor, weight: Tensor, chunks: int, fused: bool, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        # What Megatron's backward reads; the last is 0.19's.
        ctx.main_grad = getattr(weight, "main_grad", None) if fused else None
        ctx.gradient_accumulation_fusion, ctx.tp_group = fused, group
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.use_bias = True, False, False
        ctx.grad_output_buffer, ctx.wgrad_deferral_limit = None, None
        ctx.gtp_remat_size = 1
        positions, batch, width = x.shape
        gathered = _Gathering(x.contiguous().view(chunks, -1, width), group)
        out = x.new_empty(group.size() * positions, batch, len(weight))
        products = _by_chunk(out, group, chunks)
        for chunk, product in zip(gathered, products, strict=True):
            _multiply(chunk, weight.t(), product)
        return out


class _ScatteredProduct(torch.autograd.Function):
    """Product of each rank's columns, reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, chunks: int, fused: bool, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = getattr(weight, "main_grad", None) if fused else None
        ctx.chunks, ctx.fused, ctx.group = chunks, fused, group
        positions, batch, _ = x.shape
        out = x.new_empty(positions // group.size(), batch, len(weight))
        sums = out.view(chunks, -1, len(weight))
        products = _buffer((chunks, group.size(), *sums.shape[1:]), x)
        under_way = []
        for rows, product, total in zip(_by_chunk(x, group, chunks), products, sums, strict=True):
            _multiply(rows, weight.t(), product)
            product = product.flatten(0, 1)
            under_way.append(torch.distributed.reduce_scatter_tensor(total, product, group=group, async_op=True))
        for work in under_way:
            work.wait()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width, inner = weight.shape
        gathered = _Gathering(dout.contiguous().view(ctx.chunks, -1, width), ctx.group)
        # While the first chunk is gathered: [C, p M, k], in the gathered gradient's order of rows.
        rows = _by_chunk(x, ctx.group, ctx.chunks).reshape(ctx.chunks, -1, inner)
        dx = x.new_empty(x.shape)
        dweight = None
        for i, (dproduct, drows) in enumerate(zip(gathered, _by_chunk(dx, ctx.group, ctx.chunks), strict=True)):
            _multiply(dproduct, weight, drows)
            if ctx.fused:
                add_weight_gradient(ctx.main_grad, rows[i], dproduct.view(-1, width))
        if not ctx.fused:
            dweight = gathered.buffer.view(-1, width).t() @ rows.view(-1, inner)
        elif hasattr(weight, "grad_added_to_main_grad"):
            weight.grad_added_to_main_grad = True
            dweight = torch.empty_like(weight)  # Megatron's hooks expect a gradient, and don't read it
        return dx, dweight, None, None, None


class _Gathering:
    """Gathers all ranks' parts, each while the one before is used.

    Parts are [C, M, w]. Yields chunks [p, M, w], of which the first is under way when this is made.
    """

    def __init__(self, parts: Tensor, group: ProcessGroup) -> None:
        self._parts, self._group = parts, group
        self.buffer = _buffer((len(parts), group.size(), *parts.shape[1:]), parts)
        self._under_way = self._gather(0)

    def __iter__(self) -> Iterator[Tensor]:
        for i, chunk in enumerate(self.buffer):
            work = self._under_way
            if i + 1 < len(self.buffer):
                self._under_way = self._gather(i + 1)
            work.wait()
            yield chunk

    def _gather(self, i: int) -> Work:
        chunk = self.buffer[i].flatten(0, 1)  # gloo takes no other shape
        return torch.distributed.all_gather_into_tensor(chunk, self._parts[i], group=self._group, async_op=True)


def _buffer(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return Megatron's memory for gathered inputs.

    No communication with it is under way: its users wait for theirs.
    """
    found: Tensor = get_global_memory_buffer().get_tensor(list(shape), like.dtype, "mpu")
    return found


def _by_chunk(x: Tensor, group: ProcessGroup, chunks: int) -> Tensor:
    """Reorder all ranks' rows by chunks: a view, if possible.

    Rows are [s, b, w], chunks [C, p, M, w].
    """
    return x.reshape(group.size(), chunks, -1, x.shape[-1]).transpose(0, 1)


def _multiply(rows: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write the product of rows and a matrix to `out`.

    Rows are [p, M, k], the matrix [k, n], `out` [p, M, n]. It is a batch of p products, as rows and `out` may be views
    that skip other chunks: cuBLAS takes such strides without a copy.
    """
    torch.bmm(rows, matrix.expand(len(rows), *matrix.shape), out=out)
