"""Exchange keys and values, and their gradients, in the background.

They go to the ranks whose queries read them; gradients go back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.megatron.context_parallel.exchange_plan import ExchangePlan


class Exchange(ABC):
    """Exchange of one layer, with at most one collective in progress.

    Forward: call `send`, compute anything else, call `receive`. In the backward, gradients of received keys are sent
    as soon as they are known and awaited when the keys' gradients are needed. The work between `send` and `receive`
    hides both exchanges. For autograd an empty tensor links `send` to `receive`, because data in transit can't be used
    in a computation.

    Args:
        sent_counts, received: rows that go to and come from each rank.
    """

    def __init__(
        self, sent_counts: Sequence[int], received: Sequence[int], group: torch.distributed.ProcessGroup
    ) -> None:
        self.sent_counts, self.received, self._group = sent_counts, received, group
        self._under_way: tuple[torch.distributed.Work, Tensor, Tensor] | None = None

    @abstractmethod
    def packed(self, x: Tensor) -> Tensor:
        """Return the rows to send, ordered by receiver.

        `x` holds this rank's keys or values, [s / cp, b, H_kv, d].
        """

    @abstractmethod
    def add(self, total: Tensor, packed: Tensor) -> None:
        """Add gradients of sent rows to `total`, receiver by receiver.

        `total` has the shape that `packed` takes, but keys' gradients and values' are beside each other in it.
        """

    @abstractmethod
    def unpacked(self, packed: Tensor) -> Tensor:
        """Place received keys beside their values, ordered by sender."""

    @abstractmethod
    def repacked(self, x: Tensor) -> Tensor:
        """Return rows of placed keys' or values' gradients: the transpose of `unpacked`."""

    def send(self, key: Tensor, value: Tensor) -> Tensor:
        """Start sending this rank's keys and values.

        They are [s / cp, b, H_kv, d]. Returns the token that `receive` takes.
        """
        return _Send.apply(key, value, self)

    def receive(self, token: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return received keys (of dimension `dim`) and values, as `unpacked` places them."""
        return _Receive.apply(token, dim, self)

    def start(self, packed: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        """Start exchanging rows of `packed`, with the given counts per rank."""
        result = packed.new_empty(sum(received), *packed.shape[1:])
        work = torch.distributed.all_to_all_single(
            result, packed, list(received), list(sent), group=self._group, async_op=True
        )
        assert work is not None
        self._under_way = (work, packed, result)

    def wait(self) -> Tensor:
        """Wait for the exchange and return its result."""
        assert self._under_way is not None
        work, _, result = self._under_way
        work.wait()
        self._under_way = None
        return result


class KVExchange(Exchange):
    """Exchange of blocks of whole sequences.

    Received keys and values are [slots · block_size, b, H_kv, …]; unfilled slots are 0.
    """

    def __init__(self, plan: ExchangePlan, block_size: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(plan.sent_counts, plan.received, group)
        self.plan, self.block_size = plan, block_size

    def blocks(self, x: Tensor) -> Tensor:
        """View [s, b, H_kv, d] as [H_kv, blocks, b, block_size, d]."""
        return x.unflatten(0, (-1, self.block_size)).permute(3, 0, 2, 1, 4)

    def packed(self, x: Tensor) -> Tensor:
        return self.blocks(x)[self.plan.sent_blocks]

    def add(self, total: Tensor, packed: Tensor) -> None:
        blocks = self.blocks(total)
        for where, of_rank in zip(self.plan.sent, packed.split(self.sent_counts), strict=True):
            if len(of_rank):
                blocks[where] += of_rank

    def unpacked(self, packed: Tensor) -> Tensor:
        plan, num_kv_heads = self.plan, len(self.plan.columns)
        shape = (plan.slots * self.block_size, packed.shape[1], num_kv_heads, packed.shape[-1])
        # kernels read partly masked tiles: unfilled slots must be finite
        full = len(packed) == num_kv_heads * plan.slots
        result = packed.new_empty(shape) if full else packed.new_zeros(shape)
        self.blocks(result)[plan.heads, plan.places] = packed
        return result

    def repacked(self, x: Tensor) -> Tensor:
        return self.blocks(x)[self.plan.heads, self.plan.places]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange, ctx.dims = exchange, (key.shape[-1], value.shape[-1])
        ctx.shape = (*key.shape[:-1], sum(ctx.dims))
        packed = torch.cat([exchange.packed(x) for x in (key, value)], dim=-1)
        exchange.start(packed, exchange.sent_counts, exchange.received)
        return key.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        packed = ctx.exchange.wait()
        # summed in rank order, so that every run gives the same bits
        total = packed.new_zeros(ctx.shape, dtype=torch.promote_types(packed.dtype, torch.float32))
        ctx.exchange.add(total, packed)
        dkey, dvalue = (part.to(packed.dtype) for part in total.split(ctx.dims, dim=-1))
        return dkey, dvalue, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, dim: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        both = exchange.unpacked(exchange.wait())
        key, value = both.split([dim, both.shape[-1] - dim], dim=-1)
        return key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        exchange = ctx.exchange
        packed = torch.cat([exchange.repacked(gradient) for gradient in gradients], dim=-1)
        exchange.start(packed, exchange.received, exchange.sent_counts)
        return packed.new_empty(0), None, None
