"""Linear layers that communicate while they compute.

Megatron's layers with sequence parallelism wait for the whole gather before a column-parallel product, for the whole
reduce-scatter after a row-parallel one, and for the gather of its output's gradient. Here a product of one rank's rows
runs while another's are exchanged. Products and sums are the same, and so are weights, gradients and names in
checkpoints.

Shapes: p ranks hold s / p positions of b sequences each: m = s b / p rows.
"""

import weakref
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.megatron.gradient_sums import add_weight_gradient
from s2train.megatron.peer_exchange import Exchange, Gathering, Scattering


def overlap_communication(model: torch.nn.Module, exchange: Exchange) -> None:
    """Make a model's tensor parallel linear layers exchange rows while they compute.

    Call it once for all chunks of a rank's model: they share what the exchange is doing.

    They are Megatron's, with sequence parallelism and without biases.
    """
    inputs = _Inputs(exchange)
    for module in model.modules():
        if type(module) is ColumnParallelLinear:
            module.__class__ = OverlappedColumnLinear  # as Megatron's constructors have fixed classes
        elif type(module) is RowParallelLinear:
            module.__class__ = OverlappedRowLinear
        else:
            continue
        assert module.sequence_parallel
        assert module.bias is None
        module.inputs = inputs


class OverlappedColumnLinear(ColumnParallelLinear):
    """Column-parallel layer that multiplies a rank's rows while others are gathered."""

    inputs: "_Inputs"

    def _forward_impl(self, input: Tensor, weight: Tensor, **options: Any) -> Tensor:
        """Multiply all ranks' inputs by this rank's weight [n, h].

        Inputs are [s / p, b, h], the output [s, b, n].
        """
        if _is_frozen(weight):
            self.inputs.forget()
            frozen: Tensor = super()._forward_impl(input=input, weight=weight, **options)
            return frozen
        out: Tensor = _GatheredProduct.apply(input, weight, self.inputs, self.gradient_accumulation_fusion)
        self.inputs.remember(out.grad_fn)
        return out


class OverlappedRowLinear(RowParallelLinear):
    """Row-parallel layer that multiplies rows for a rank while others' are sent."""

    inputs: "_Inputs"

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Sum the ranks' products, and keep this rank's rows.

        Inputs are [s, b, k], weights [n, k], the output [s / p, b, n].
        """
        if _is_frozen(self.weight):
            self.inputs.forget()
            out, _ = super().forward(input_)
        else:
            out = _ScatteredProduct.apply(input_, self.weight, self.inputs, self.gradient_accumulation_fusion)
        return out, None


def _is_frozen(weight: Tensor) -> bool:
    """Whether a backward pass would skip the weight's gradient.

    Megatron has functions for that.
    """
    return torch.is_grad_enabled() and not weight.requires_grad


class _Inputs:
    """A model's exchange, and inputs gathered for gradients of weights.

    Between the backward of a row-parallel layer and that of the column-parallel layer before it, attention or the MLP's
    function is computed, and nothing is exchanged: the column-parallel layer's input is gathered meanwhile.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._ahead: tuple[Any, Gathering, Tensor] | None = None
        # A node keeps the whole graph before it, and no row-parallel layer follows the output layer.
        self._last: weakref.ref[Any] | None = None

    def remember(self, column: Any) -> None:
        """Remember a column-parallel layer's node in autograd's graph, if any."""
        self._last = None if column is None else weakref.ref(column)

    def forget(self) -> Any:
        """Return the remembered node, if it still is, and forget it."""
        last, self._last = self._last, None
        return None if last is None else last()

    def gather(self, rows: Tensor) -> Gathering:
        self._give_up()
        return self._exchange.gather(rows)

    def scatter(self, rows: Tensor, width: int) -> Scattering:
        self._give_up()
        return self._exchange.scatter(rows, width)

    def gather_ahead(self, column: Any) -> None:
        """Start to gather the input of a column-parallel layer's product."""
        x, weight = column.saved_tensors
        self._ahead = column, self.gather(_rows(x)), weight

    def gathered(self, column: Any) -> tuple[Gathering, Tensor]:
        """Return a product's input, under way, and its weight."""
        if self._ahead is None or self._ahead[0] is not column:
            self.gather_ahead(column)
        assert self._ahead is not None
        _, gathered, weight = self._ahead
        self._ahead = None
        return gathered, weight

    def _give_up(self) -> None:
        """End a gathering if another exchange comes before its use.

        That happens if a column-parallel layer's gradients are not computed.
        """
        if self._ahead is not None:
            _wait(self._ahead[1])
            self._ahead = None


class _GatheredProduct(torch.autograd.Function):
    """Product of all ranks' rows, gathered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inputs: _Inputs, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.inputs, ctx.shape, ctx.main_grad = inputs, x.shape, _main_grad(weight, fused)
        gathered = inputs.gather(_rows(x))
        out = x.new_empty(len(gathered.full) * len(x), x.shape[1], len(weight))
        _multiply_gathered(gathered, weight.t(), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gathered, weight = ctx.inputs.gathered(ctx)
        dout = _rows(dout)
        sums = _multiply_scattered(ctx.inputs, dout, weight)
        _wait(gathered)
        dweight = _weight_gradient(ctx.main_grad, weight, gathered.full, dout)  # while gradients are sent
        dx = dout.new_empty(ctx.shape)
        sums.sum(_rows(dx))
        return dx, dweight, None, None


class _ScatteredProduct(torch.autograd.Function):
    """Product of each rank's columns, reduce-scattered."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inputs: _Inputs, fused: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.inputs, ctx.main_grad = inputs, _main_grad(weight, fused)
        ctx.column = inputs.forget()
        sums = _multiply_scattered(inputs, _rows(x), weight.t())
        out = x.new_empty(len(x) // sums.ranks, x.shape[1], len(weight))
        sums.sum(_rows(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gathered = ctx.inputs.gather(_rows(dout))
        dx = x.new_empty(x.shape)
        _multiply_gathered(gathered, weight, dx)
        dweight = _weight_gradient(ctx.main_grad, weight, _rows(x), gathered.full)
        if ctx.column is not None:
            ctx.inputs.gather_ahead(ctx.column)
        return dx, dweight, None, None


def _rows(x: Tensor) -> Tensor:
    """View [s, b, w] as contiguous rows; copy if needed."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _multiply_gathered(gathered: Gathering, matrix: Tensor, out: Tensor) -> None:
    """Multiply rows [p, m, k] by [k, n] as they arrive.

    `out` is contiguous, [s, b, n]. It is no view that autograd would protect from being written again.
    """
    products = out.view(*gathered.full.shape[:2], -1)
    for rank in gathered:
        torch.mm(gathered.full[rank], matrix, out=products[rank])


def _wait(gathered: Gathering) -> None:
    """Wait until all rows are there."""
    for _ in gathered:
        pass


def _multiply_scattered(inputs: _Inputs, rows: Tensor, matrix: Tensor) -> Scattering:
    """Multiply rows [p m, k] by [k, n], and send the products."""
    sums = inputs.scatter(rows, matrix.shape[1])
    for rank, part in sums:
        torch.mm(rows[rank * len(part) : (rank + 1) * len(part)], matrix, out=part)
    return sums


def _main_grad(weight: Tensor, fused: bool) -> Tensor | None:
    return getattr(weight, "main_grad", None) if fused else None


def _weight_gradient(main_grad: Tensor | None, weight: Tensor, inputs: Tensor, doutputs: Tensor) -> Tensor | None:
    """Return doutputs^T inputs, or add it to the weight's fp32 buffer."""
    inputs, doutputs = inputs.view(-1, inputs.shape[-1]), doutputs.view(-1, doutputs.shape[-1])
    if main_grad is None:
        return doutputs.t() @ inputs
    add_weight_gradient(main_grad, inputs, doutputs)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    # Megatron's hooks expect a gradient. They add it where embeddings with the same weight have another.
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
