"""Attention of this rank's queries over kept key blocks from any rank."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from s2train.kernels.layout import BlockLayout
from s2train.megatron.context_parallel.all_gather import chunk_ids, gather_seen
from s2train.megatron.context_parallel.exchange_plan import ExchangePlan, exchange_plan
from s2train.megatron.context_parallel.kv_exchange import KVExchange

T = TypeVar("T")


class Attend(Protocol):
    """The sparse op with scale and backend set.

    See `s2train.kernels.attention.block_sparse_attention`.
    """

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, query_offset: int, return_lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute output and, if requested, log-sum-exp.

        Their shapes are [s_q, b, h, d] and [b, h, s_q].
        """
        ...


def attend_gathered(
    attend: Callable[[Tensor, Tensor, Tensor, int], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Compute attention over all keys, one query chunk at a time.

    Gathers the keys of the whole sequence. Works for any layout or none.

    Args:
        attend: takes queries, keys from position 0 on, values, and the first query's position; the last query is at
            the last key.
        query, key, value: as in `attend_after_exchange`.
    """
    keys, values = gather_seen(key, value, group)  # later keys are masked
    rows = query.shape[0] // 2
    chunks = zip(chunk_ids(group.rank(), group.size()), query.chunk(2), keys, values, strict=True)
    return torch.cat([attend(part, seen, of_seen, chunk * rows) for chunk, part, seen, of_seen in chunks])


def attend_after_exchange(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Compute attention over received and own keys in one call.

    Args:
        query: [s / cp, b, h, d], this rank's two chunks of the sequence.
        key, value: [s / cp, b, h_kv, d], the same chunks.
        layout: of the whole sequence and this rank's heads.
    """
    exchange = KVExchange(rank_exchange_plan(layout, key.shape[2], group), layout.block_size, group)
    keys, values = exchange.receive(*exchange.send(key, value), before_own=True)
    offset = exchange.plan.slots * layout.block_size
    out = attend(query, keys, values, _cached(ExchangePlan.whole, exchange.plan, layout), offset, return_lse=False)
    assert isinstance(out, Tensor)
    return out


def attend_overlapped(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Compute attention over own keys during the exchange, then over received keys.

    Arguments are those of `attend_after_exchange`; the two results are merged. Queries are read and results
    written twice, so this is faster only if the exchange takes longer than that.
    """
    exchange = KVExchange(rank_exchange_plan(layout, key.shape[2], group), layout.block_size, group)
    own, remote = _cached(ExchangePlan.apart, exchange.plan, layout)
    key, value = exchange.send(key, value)
    near = attend(query, key, value, own, 0, return_lse=True)
    far_key, far_value = exchange.receive(key, value)
    offset = exchange.plan.slots * layout.block_size
    far = attend(query, far_key, far_value, remote, offset, return_lse=True)
    assert isinstance(near, tuple)
    assert isinstance(far, tuple)
    return merge(near, far)


def merge(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Tensor:
    """Merge two attention results over disjoint keys.

    Each is [s, b, h, d] with its log-sum-exp [b, h, s]. Rows of `far` may see no key (log-sum-exp -inf); rows of `near`
    always see one.
    """
    (out, lse), (far_out, far_lse) = near, far
    weight = torch.sigmoid(far_lse - lse).permute(2, 0, 1).unsqueeze(-1)  # exp(far) / (exp(near) + exp(far))
    return torch.lerp(out.to(weight.dtype), far_out.to(weight.dtype), weight).to(out.dtype)


def rank_exchange_plan(layout: BlockLayout, num_kv_heads: int, group: torch.distributed.ProcessGroup) -> ExchangePlan:
    """Return the exchange plan of this rank; cached in the layout."""
    name = ("context parallel plan", num_kv_heads, group.rank(), group.size())
    if name not in layout.cache:
        layout.cache[name] = exchange_plan(layout, *name[1:])
    plan = layout.cache[name]
    assert isinstance(plan, ExchangePlan)
    return plan


def _cached(make: Callable[[ExchangePlan, BlockLayout], T], plan: ExchangePlan, layout: BlockLayout) -> T:
    """Return `make(plan, layout)`; cached in the layout."""
    name = (make, plan)
    if name not in layout.cache:
        layout.cache[name] = make(plan, layout)
    found: T = layout.cache[name]
    return found
