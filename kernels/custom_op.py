"""Custom operators for torch.compile: forward and backward, opaque to tracing.

Only traced calls use them: a custom operator costs the host 50 to 100 us more than an autograd function. Operators
take tensors and numbers, so a `BlockLayout` is passed as its handle and a `TopKLayout` as its indices and sizes. A
`TopKLayout` is not registered; the operators rebuild its index lists from the indices.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .arguments import check_values
from .bounds_cache import built_anew
from .handles import registered
from .layout import BlockLayout
from .spec import AttentionSpec, Format, from_bhsd, shape_bhsd, to_bhsd
from .topk_layout import Layout, TopKLayout
from .torch_backend import lse_dtype, torch_attention, torch_gradients


@torch.library.custom_op("s2train::block_sparse_attention", mutates_args=())
@built_anew()
def attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None, handle: int, block_size: int,
    num_key_blocks: int, softmax_scale: float, causal: bool, query_offset: int, format: str, backend: str,
    with_lse: bool, split_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute output and log-sum-exp as `block_sparse_attention` does.

    The log-sum-exp is empty unless `with_lse`.

    Args:
        indices, block_size, num_key_blocks: of a TopKLayout, whose handle is 0.
        handle: of a BlockLayout; `indices` is None then.
        backend: "triton", "portable" or "torch".
        split_columns: for the backward.
    """
    spec = AttentionSpec(softmax_scale, causal, query_offset, cu_seqlens, _format(format), backend == "portable")
    layout = _layout(indices, handle, block_size, num_key_blocks, shape_bhsd(q, spec.format)[1])
    check_values(layout, spec, shape_bhsd(q, spec.format)[2])
    if backend == "torch":
        out, lse = torch_attention(q, k, v, layout, spec, with_lse=with_lse)
        return out, _no_lse(q) if lse is None else lse
    from .tiles import last_contiguous
    from .triton_backend import run_forward

    q, k, v = (last_contiguous(to_bhsd(x, spec.format)) for x in (q, k, v))
    out, lse = run_forward(q, k, v, layout, spec)
    return from_bhsd(out, spec.format), lse


@attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, indices: Tensor | None, handle: int, block_size: int,
    num_key_blocks: int, softmax_scale: float, causal: bool, query_offset: int, format: str, backend: str,
    with_lse: bool, split_columns: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    if backend == "torch" and not with_lse:
        return out, _no_lse(q)
    return out, q.new_empty(shape_bhsd(q, cast(Format, format))[:3], dtype=lse_dtype(q.dtype))


@torch.library.custom_op("s2train::block_sparse_attention_backward", mutates_args=())
@built_anew()
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    cu_seqlens: Tensor | None, indices: Tensor | None, handle: int, block_size: int, num_key_blocks: int,
    softmax_scale: float, causal: bool, query_offset: int, format: str, backend: str, with_lse: bool,
    split_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute contiguous gradients of q, k and v.

    A gradient of None counts as 0. The other arguments are those of `attend`.
    """
    portable = backend == "portable"
    spec = AttentionSpec(softmax_scale, causal, query_offset, cu_seqlens, _format(format), portable, split_columns)
    layout = _layout(indices, handle, block_size, num_key_blocks, shape_bhsd(q, spec.format)[1])
    if backend == "torch":
        return torch_gradients(q, k, v, dout, dlse if with_lse else None, layout, spec)
    from .tiles import last_contiguous
    from .triton_backend import run_backward

    q, k, v, out = (last_contiguous(to_bhsd(x, spec.format)) for x in (q, k, v, out))
    dout = None if dout is None else to_bhsd(dout, spec.format)
    dq, dk, dv = run_backward(q, k, v, out, lse.contiguous(), dout, dlse, layout, spec)
    return from_bhsd(dq, spec.format), from_bhsd(dk, spec.format), from_bhsd(dv, spec.format)


@attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor | None, dlse: Tensor | None,
    cu_seqlens: Tensor | None, indices: Tensor | None, handle: int, block_size: int, num_key_blocks: int,
    softmax_scale: float, causal: bool, query_offset: int, format: str, backend: str, with_lse: bool,
    split_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def register_gradients(attend: CustomOpDef, attend_backward: CustomOpDef) -> None:
    """Have autograd call one operator for the gradients of another.

    The first takes q, k, v, two tensors or None, and settings, and returns output and log-sum-exp. The second takes
    these two and their gradients after v. A gradient of None counts as 0.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, first, second, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, *output, first, second)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *others = ctx.saved_tensors
        nothing = [None] * (2 + len(ctx.settings))
        if dout is None and dlse is None:
            return None, None, None, *nothing
        return *attend_backward(q, k, v, out, lse, dout, dlse, *others, *ctx.settings), *nothing

    attend.register_autograd(differentiate, setup_context=keep)


register_gradients(attend, attend_backward)


def layout_arguments(layout: Layout) -> tuple[Tensor | None, int, int, int]:
    """Return `indices`, `handle`, `block_size` and `num_key_blocks` for the operators."""
    if isinstance(layout, TopKLayout):
        return layout.indices, 0, layout.block_size, layout.num_key_blocks
    return None, layout.handle, 0, 0


def _layout(indices: Tensor | None, handle: int, block_size: int, num_key_blocks: int, num_heads: int) -> Layout:
    if indices is None:
        found: BlockLayout = registered(handle)
        return found
    return TopKLayout(indices, block_size, num_heads, num_key_blocks)


def _format(format: str) -> Format:
    return cast(Format, format)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=lse_dtype(q.dtype))
