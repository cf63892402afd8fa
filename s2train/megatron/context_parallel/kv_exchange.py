"""Exchange keys and values, and their gradients, in the background.

They go to the ranks whose queries read them; gradients go back.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from s2train.megatron.context_parallel.copies import Pair, copy, put, take, wide
from s2train.megatron.context_parallel.exchange_plan import ExchangePlan
from s2train.megatron.context_parallel.returned import Returned


class Moves(Protocol):
    """What one rank sends and receives, in the units of an exchange.

    Attributes:
        sent: indices of own units to send, ordered by receiver.
        sent_counts, received: units that go to and come from each rank.
        places: indices of received units where they are placed, ordered by sender.
        is_full: whether received units fill all places.
        returned: how the gradients of sent units are summed.
    """

    @property
    def sent(self) -> tuple[Tensor, ...]: ...
    @property
    def sent_counts(self) -> Sequence[int]: ...
    @property
    def places(self) -> tuple[Tensor, ...]: ...
    @property
    def received(self) -> Sequence[int]: ...
    @property
    def is_full(self) -> bool: ...
    @property
    def returned(self) -> Returned: ...


class Exchange(ABC):
    """Exchange of one layer, with at most one collective in progress.

    Forward: call `send`, compute anything else, call `receive`. In the backward, gradients of received keys are sent
    as soon as they are known and awaited when the keys' gradients are needed. The work between `send` and `receive`
    hides both exchanges.
    """

    def __init__(self, moves: Moves, group: torch.distributed.ProcessGroup) -> None:
        self.moves, self._group = moves, group
        self._under_way: tuple[torch.distributed.Work, Tensor, Tensor] | None = None

    @abstractmethod
    def units(self, x: Tensor) -> Tensor:
        """View keys or values, [s, b, H_kv, d], as units.

        The dimensions that the plan's indices name come first; d stays last.
        """

    @abstractmethod
    def received_shape(self, x: Tensor) -> tuple[int, ...]:
        """Return the shape of received keys or values, given own ones."""

    def send(self, key: Tensor, value: Tensor) -> Pair:
        """Start sending this rank's keys and values, and return them.

        They are [s / cp, b, H_kv, d]. Compute with those that are returned: their gradients and those from other ranks
        are summed in at least fp32, in rank order, and rounded once.
        """
        return _Send.apply(key, value, self)

    def receive(self, key: Tensor, value: Tensor, *, before_own: bool = False) -> Pair:
        """Return received keys and values at their places; others hold 0.

        Args:
            key, value: what `send` returned.
            before_own: append these to the received ones.
        """
        return _Receive.apply(key, value, before_own, self)

    def start_keys(self, key: Tensor, value: Tensor) -> None:
        """Start the exchange of keys and values."""
        moves = self.moves
        packed = take(self._views(key, value), moves.sent)
        self._start(packed.view(key.dtype), moves.sent_counts, moves.received)

    def place_keys(self, key: Tensor, value: Tensor, *, before_own: bool) -> Pair:
        """Wait for keys and values, and place them as `receive` says."""
        rows, *shape = self.received_shape(key)
        more = key.shape[0] if before_own else 0
        both = key.new_empty(rows + more, *shape), value.new_empty(rows + more, *shape[:-1], value.shape[-1])
        # what needs nothing received is written during the exchange
        for x, own in zip(both, (key, value), strict=True):
            if not self.moves.is_full:
                x[:rows].zero_()  # kernels read partly masked tiles: unfilled places must be finite
            if before_own:
                copy(own, x[rows:])
        views = self._views(*both)
        put(self._wait().view(views[0].dtype), views, self.moves.places)
        return both

    def start_gradients(self, keys: Tensor, values: Tensor) -> None:
        """Start the exchange of gradients of what `place_keys` returned."""
        moves = self.moves
        packed = take(self._views(keys, values), moves.places)
        self._start(packed.view(keys.dtype), moves.received, moves.sent_counts)

    def sum_gradients(self, key: Tensor, value: Tensor) -> Pair:
        """Wait for gradients, and return their sums with this rank's."""
        returned, dtype = self.moves.returned, key.dtype
        if not returned.counts:
            self._wait()
            return key, value
        # what needs nothing received is computed during the exchange
        key, value = (x.clone(memory_format=torch.contiguous_format) for x in (key, value))
        views = self._views(key, value)
        taken = take(views, returned.units)
        sums = taken.view(dtype).to(torch.promote_types(dtype, torch.float32))
        ordered = self._wait().view(taken.dtype)[returned.order].view(dtype)
        for count, part in zip(returned.counts, ordered.split(returned.counts), strict=True):
            sums[:count].add_(part)
        put(sums.to(dtype).view(taken.dtype), views, returned.units)
        return key, value

    def _views(self, key: Tensor, value: Tensor) -> Pair:
        key, value = wide(key, value)
        return self.units(key), self.units(value)

    def _start(self, packed: Tensor, sent: Sequence[int], received: Sequence[int]) -> None:
        """Start exchanging rows of `packed`, with the given counts per rank."""
        result = packed.new_empty(sum(received), *packed.shape[1:])
        work = torch.distributed.all_to_all_single(
            result, packed, list(received), list(sent), group=self._group, async_op=True
        )
        assert work is not None
        self._under_way = (work, packed, result)

    def _wait(self) -> Tensor:
        """Wait for the exchange and return its result."""
        assert self._under_way is not None
        work, _, result = self._under_way
        work.wait()
        self._under_way = None
        return result


class KVExchange(Exchange):
    """Exchange of blocks of whole sequences.

    A unit is a block of one KV head. Received keys and values are [slots · block_size, b, H_kv, …].
    """

    def __init__(self, plan: ExchangePlan, block_size: int, group: torch.distributed.ProcessGroup) -> None:
        super().__init__(plan, group)
        self.plan, self.block_size = plan, block_size

    def units(self, x: Tensor) -> Tensor:
        """View [s, b, H_kv, d] as [H_kv, blocks, b, block_size, d]."""
        size, (length, batch, heads, dim), (row, sequence, head, element) = self.block_size, x.shape, x.stride()
        strides = (head, size * row, sequence, row, element)
        return x.as_strided((heads, length // size, batch, size, dim), strides)

    def received_shape(self, x: Tensor) -> tuple[int, ...]:
        return self.plan.slots * self.block_size, *x.shape[1:]


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, exchange: Exchange) -> Pair:
        ctx.exchange = exchange
        exchange.start_keys(key, value)
        return key.view_as(key), value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.exchange.sum_gradients(key, value), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, before_own: bool, exchange: Exchange) -> Pair:
        ctx.exchange, ctx.own = exchange, key.shape[0] if before_own else 0
        return exchange.place_keys(key, value, before_own=before_own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, keys: Tensor, values: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        ctx.exchange.start_gradients(keys, values)
        return (keys[-ctx.own :], values[-ctx.own :], None, None) if ctx.own else (None, None, None, None)
