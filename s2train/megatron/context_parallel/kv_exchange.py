"""Exchange key and value blocks, and their gradients, in the background.

Blocks go to the ranks whose queries keep them; gradients go back.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.megatron.context_parallel.exchange_plan import ExchangePlan


class KVExchange:
    """Exchange of one layer, with at most one collective in progress.

    Forward: call `send`, compute anything else, call `receive`. In the backward, gradients of received blocks are sent
    as soon as they are known and awaited when the keys' gradients are needed. The work between `send` and `receive`
    hides both exchanges. For autograd an empty tensor links `send` to `receive`, because data in transit can't be used
    in a computation.
    """

    def __init__(self, plan: ExchangePlan, block_size: int, group: torch.distributed.ProcessGroup) -> None:
        self.plan, self.block_size, self._group = plan, block_size, group
        self._under_way: tuple[torch.distributed.Work, Tensor, Tensor] | None = None

    def send(self, key: Tensor, value: Tensor) -> Tensor:
        """Start sending this rank's keys and values [s / cp, b, H_kv, d].

        Returns the token that `receive` takes.
        """
        return _Send.apply(key, value, self)

    def receive(self, token: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Return other ranks' keys (of dimension `dim`) and values.

        Their shape is [slots · block_size, b, H_kv, …]; unfilled slots are 0.
        """
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

    def blocks(self, x: Tensor) -> Tensor:
        """View [s, b, H_kv, d] as [H_kv, blocks, b, block_size, d]."""
        return x.unflatten(0, (-1, self.block_size)).permute(3, 0, 2, 1, 4)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, exchange: KVExchange) -> Tensor:
        ctx.exchange, ctx.shapes = exchange, (key.shape, value.shape)
        plan = exchange.plan
        heads, blocks = (torch.cat(parts) for parts in zip(*plan.sent, strict=True))
        packed = torch.cat([exchange.blocks(x)[heads, blocks] for x in (key, value)], dim=-1)
        exchange.start(packed, plan.sent_counts, plan.received)
        return key.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange = ctx.exchange
        packed, plan = exchange.wait(), exchange.plan
        parts = packed.split([shape[-1] for shape in ctx.shapes], dim=-1)
        gradients = []
        for shape, part in zip(ctx.shapes, parts, strict=True):
            # summed in rank order, so that every run gives the same bits
            total = packed.new_zeros(shape, dtype=torch.promote_types(packed.dtype, torch.float32))
            blocks = exchange.blocks(total)
            for where, of_rank in zip(plan.sent, part.split(plan.sent_counts), strict=True):
                blocks[where] += of_rank
            gradients.append(total.to(packed.dtype))
        return gradients[0], gradients[1], None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, dim: int, exchange: KVExchange) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange
        packed, plan = exchange.wait(), exchange.plan
        num_kv_heads = len(plan.columns)
        results = []
        for part in packed.split([dim, packed.shape[-1] - dim], dim=-1):
            shape = (plan.slots * exchange.block_size, packed.shape[1], num_kv_heads, part.shape[-1])
            # kernels read partly masked tiles: unfilled slots must be finite
            full = len(packed) == num_kv_heads * plan.slots
            result = packed.new_empty(shape) if full else packed.new_zeros(shape)
            exchange.blocks(result)[plan.heads, plan.places] = part
            results.append(result)
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        exchange, plan = ctx.exchange, ctx.exchange.plan
        where = (plan.heads, plan.places)
        packed = torch.cat([exchange.blocks(gradient)[where] for gradient in gradients], dim=-1)
        exchange.start(packed, plan.received, plan.sent_counts)
        return packed.new_empty(0), None, None
