"""Public operation: attention probability of key blocks, averaged over query blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_triton_dtype, scale_of
from ..attention import Backend, resolve_backend
from ..spec import Format, to_bhsd
from ..topk_layout import TopKLayout
from .blocks import check_call, query_blocks
from .reference import reference_mass
from .spec import StatisticSpec


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    layout: TopKLayout | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    query_offset: int = 0,
    format: Format = "sbhd",
    backend: Backend = "auto",
) -> Tensor:
    """Compute the mean probability that a query block gives a key block.

    With A = exp(scale * q k^T - lse), masked causally, the result for query block I and key block J is

        mean over the rows i of I, and over the query heads of a KV head, of the sum over j in J of A_ij.

    The mean is over the rows that the call has in I: fewer than `block_size` in a partial block. A row without any
    visible key (lse -inf) counts as a row, with probability 0. So where lse is that of attention over all visible keys,
    a query block's masses sum to 1; later key blocks have mass exactly 0.

    Args:
        q: [s_q, b, H, d] in format "sbhd", and k: [s_k, b, H_kv, d], as in `block_sparse_attention`.
        lse: natural log-sum-exp of the scaled scores, float32 [b, H, s_q], as `block_sparse_attention` returns it. It
            decides what the masses are shares of. Without `layout` it must be that of attention over all visible keys:
            with another's, masses of keys that it left out exceed 1.
        layout: evaluate only the blocks that it lists. With the lse of attention over this layout a list's masses sum
            to 1; with that of dense attention their sum is the recall of the list.
        causal, query_offset, softmax_scale, format, backend: as in `block_sparse_attention`.

    Returns:
        float32 [b, H_kv, n_q, n_k] (float64 for float64), without gradient: a target, not a function to train through.
        Row r is query block query_offset // block_size + r, up to the one of the last row. With `layout`
        [b, H_kv, n_q, k]: slot s holds the mass of the key block that slot s of the layout lists; unused slots, and a
        block's second mention in a list, have 0.

    Memory: 4 * b * H * n_q * n_k bytes while it runs (k in place of n_k with `layout`): the Triton kernel writes each
    head's result first. The same in every run: there are no atomic sums. Precision as in `block_sparse_attention`.

    Raises:
        ValueError: arguments don't fit together; the message names the argument and the remedy.
    """
    check_call({"q": q, "k": k}, {"lse": lse}, format, block_size, query_offset)
    qh, kh = to_bhsd(q.detach(), format), to_bhsd(k.detach(), format)
    if layout is not None:
        _check_layout(layout, qh, kh, block_size, query_offset)
        layout.check_values()
    spec = StatisticSpec(block_size, scale_of(softmax_scale, qh.shape[-1]), causal, query_offset)
    with torch.no_grad():
        if resolve_backend(backend, q.device) == "torch":
            precise = torch.promote_types(q.dtype, torch.float32)
            return reference_mass(qh.to(precise), kh.to(precise), lse.detach(), spec, layout)
        check_triton_dtype(q, "q and k")
        # imported here so that a process loads only the backend that it uses
        from .mass_kernel import triton_mass

        return triton_mass(qh, kh, lse.detach(), spec, layout)


def _check_layout(layout: TopKLayout, q: Tensor, k: Tensor, block_size: int, query_offset: int) -> None:
    b, heads, s_q, _ = q.shape
    kv_heads, s_k = k.shape[1:3]
    if not isinstance(layout, TopKLayout):
        raise ValueError(
            f"layout must be a TopKLayout or None, got {type(layout).__name__}: its slots are the result's"
        )
    if layout.block_size != block_size:
        raise ValueError(f"the layout has blocks of {layout.block_size}, block_size is {block_size}: use one")
    if layout.device != q.device:
        raise ValueError(f"q is on {q.device} but the layout on {layout.device}: move it there")
    if layout.batch_size != b or layout.num_heads != heads or layout.num_lists != kv_heads:
        raise ValueError(
            f"the layout has {layout.batch_size} x {layout.num_lists} lists for {layout.num_heads} heads; q and k have "
            f"{b} sequences, {heads} heads and {kv_heads} KV heads: give each KV head a list"
        )
    first, count = query_blocks(s_q, query_offset, block_size)
    if first + count > layout.num_query_blocks or -(-s_k // block_size) > layout.num_key_blocks:
        raise ValueError(
            f"the layout is too small: {layout.num_query_blocks} x {layout.num_key_blocks} blocks, "
            f"{first + count} x {-(-s_k // block_size)} are needed"
        )
