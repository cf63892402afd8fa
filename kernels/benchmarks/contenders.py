"""Our kernels and others behind one signature, each in its best format.

The signature is q, k, v to output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..attention import block_sparse_attention
from ..flash4 import fa4_functions, fa4_problem, fa4_unsupported_reason
from ..layout import BlockLayout
from ..spec import Format
from .cases import Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotSupportedError(Exception):
    """A contender cannot compute a case; the message says why."""


@dataclass
class Problem:
    """A case on a device, with the sparse contenders' layout."""

    case: Case
    device: torch.device

    @cached_property
    def layout(self) -> BlockLayout:
        return self.case.layout(self.device)


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    `prepare` returns the attention, or raises NotSupportedError. Contenders that are not `sparse` compute full causal
    attention for any mask. `bytes_needed` estimates the peak memory besides q, k, v and the output's gradient. `passes`
    is the minimum number of passes: one that is checked, three that are timed, and a contender's own tuning.
    """

    name: str
    label: str
    format: Format
    sparse: bool
    prepare: Callable[[Problem], Attention]
    bytes_needed: Callable[[Case], int]
    passes: int = 4


def _results(case: Case) -> int:
    """Return bytes of output, dq, dk, dv in bfloat16, which everyone allocates."""
    return 2 * case.length * case.dim * (2 * case.heads + 2 * case.kv_heads)


def _queries(case: Case) -> int:
    return 2 * case.length * case.dim * case.heads


def _rows(case: Case) -> int:
    """Return bytes of log-sum-exp, its gradient and the backward's delta."""
    return 3 * 4 * case.heads * case.length


def _block_pairs(case: Case) -> int:
    return case.heads * (case.length // case.block) ** 2


# The multiples of q's bytes below are from measured peaks: dq accumulated in float32, and with grouped heads dk and dv
# of every query head.
def _ours_bytes(case: Case) -> int:
    pairs = _block_pairs(case) * case.num_patterns // case.heads
    indices = 48 * int(pairs * case.density() / 2)
    return _results(case) + 2 * _queries(case) + _rows(case) + indices


def _flex_bytes(case: Case) -> int:
    """Return bytes of FlexAttention's index tensors.

    Four dense int32 tensors remain; before there are results, three of int64 exist while they are sorted.
    """
    stay, sorting = 4 * 4 * _block_pairs(case), 3 * 8 * _block_pairs(case)
    return stay + max(sorting, _results(case) + _rows(case))


def _fa4_sparse_bytes(case: Case) -> int:
    """Return bytes of FlashAttention-4's index tensors.

    They are dense int32, of diagonal and whole blocks, by rows and by columns, and int64 while they are sorted.
    """
    return _results(case) + 2 * _queries(case) + _rows(case) + (4 * 4 + 3 * 8) * _block_pairs(case)


def _dkernel_bytes(case: Case) -> int:
    return _results(case) + 8 * _block_pairs(case)


def _dense_bytes(queries: int) -> Callable[[Case], int]:
    def needed(case: Case) -> int:
        expanded = 2 if case.heads != case.kv_heads else 0
        return _results(case) + (queries + expanded) * _queries(case)

    return needed


def _ours(problem: Problem) -> Attention:
    layout = problem.layout
    return lambda q, k, v: block_sparse_attention(q, k, v, layout)


def _torch_dense(backend: SDPBackend) -> Callable[[Problem], Attention]:
    def prepare(problem: Problem) -> Attention:
        if problem.device.type != "cuda":
            raise NotSupportedError("needs CUDA")
        grouped = problem.case.heads != problem.case.kv_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        return attend

    return prepare


def _causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def flex_block_mask(layout: BlockLayout) -> BlockMask:
    """Convert the layout for compiled FlexAttention.

    Blocks below the diagonal are whole; those on it are masked by token.
    """
    mask = layout.mask()
    n = mask.shape[-1]
    below = mask & torch.ones(n, n, dtype=torch.bool, device=mask.device).tril(-1)
    on = mask & torch.eye(n, dtype=torch.bool, device=mask.device)
    return BlockMask.from_kv_blocks(
        *_counts_and_columns(on), *_counts_and_columns(below), BLOCK_SIZE=layout.block_size, mask_mod=_causal
    )


def _counts_and_columns(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's number of kept columns, and columns, kept first.

    From bool [H, n, n]: int32 [1, H, n] and int32 [1, H, n, n].
    """
    columns = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32)[None], columns.to(torch.int32)[None]


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch._dynamo import config  # a second's import, only for this contender

    # fastest with static shapes; each length and head count is then compiled separately
    config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def _flex(problem: Problem) -> Attention:
    case = problem.case
    if case.block % 128:
        raise NotSupportedError(f"its kernels reject blocks of {case.block}")
    if problem.device.type != "cuda":
        raise NotSupportedError("uncompiled, it computes dense matrices")
    compiled, mask = _compiled_flex(), flex_block_mask(problem.layout)
    grouped = case.heads != case.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)


def dkernel_op(problem: Problem) -> Any:
    """Return dkernel's module for a problem; raise NotSupportedError if it can't run."""
    case = problem.case
    try:
        from dkernel import SparseAttention  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:  # its import can run anything
        raise NotSupportedError(f"not importable: {type(error).__name__}: {error}"[:200]) from error
    if case.heads != case.kv_heads:
        raise NotSupportedError("takes fewer KV heads and reads outside of them")
    return SparseAttention(case.block, problem.layout.mask().to(torch.uint8), seq_dim=2).to(problem.device)


def _dkernel(problem: Problem) -> Attention:
    case, op = problem.case, dkernel_op(problem)
    return lambda q, k, v: op(q, k, v, sm_scale=case.dim**-0.5)


def _fa4_lists(problem: Problem) -> tuple[Any, Any]:
    """Convert the layout for FlashAttention-4.

    Returns keys of query blocks, and queries of key blocks for its backward.
    """
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    mask, size = problem.layout.mask(), problem.case.block
    on = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device) & mask
    below = mask & ~on
    lists = []
    for diagonal, whole in ((on, below), (on.mT, below.mT)):
        counts = (*_counts_and_columns(diagonal), *_counts_and_columns(whole))
        lists.append(BlockSparseTensorsTorch(*(x.contiguous() for x in counts), block_size=(size, size)))
    return lists[0], lists[1]


@cache
def _fa4_causal() -> Callable[..., Any]:
    """Return its mask of the diagonal blocks, in its own language."""
    import cutlass.cute as cute

    @cute.jit
    def causal(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, aux_tensors: Any) -> Any:
        return key <= query

    function: Callable[..., Any] = causal
    return function


def _needs_fa4(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise NotSupportedError("needs CUDA")
    if (why := fa4_problem()) is not None:
        raise NotSupportedError(why)
    capability = torch.cuda.get_device_capability()
    if (why := fa4_unsupported_reason(capability, torch.bfloat16, problem.case.dim)) is not None:
        raise NotSupportedError(why)


def _fa4_sparse(problem: Problem) -> Attention:
    if problem.case.block != 128:
        raise NotSupportedError(f"its backward rejects blocks of {problem.case.block}")
    _needs_fa4(problem)
    whole, _ = fa4_functions()
    forward, backward = _fa4_lists(problem)
    options = {"mask_mod": _fa4_causal(), "block_sparse_tensors": forward, "block_sparse_tensors_bwd": backward}
    return lambda q, k, v: whole(q, k, v, **options)[0]


def _fa4_dense(problem: Problem) -> Attention:
    _needs_fa4(problem)
    whole, _ = fa4_functions()
    return lambda q, k, v: whole(q, k, v, causal=True)[0]


def _fa3_dense(problem: Problem) -> Attention:
    """Return FlashAttention-3, the module flash_attn_interface.

    Its repository's folder `hopper` builds it.
    """
    try:
        from flash_attn_interface import flash_attn_func
    except Exception as error:  # a build for another torch can raise anything
        raise NotSupportedError(f"not importable: {type(error).__name__}: {error}"[:200]) from error

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor | tuple[Tensor, ...] = flash_attn_func(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # its first releases also return the log-sum-exp

    return attend


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours", "s2train", "sbhd", True, _ours, _ours_bytes),
        Contender("flex", "FlexAttention", "bhsd", True, _flex, _flex_bytes),
        Contender("fa4_sparse", "FlashAttention-4", "bshd", True, _fa4_sparse, _fa4_sparse_bytes),
        # it times 12 forward and 10 backward configurations at every length, each about 9 times
        Contender("dkernel", "dkernel", "bhsd", True, _dkernel, _dkernel_bytes, passes=100),
        Contender("cudnn", "dense, cuDNN", "bhsd", False, _torch_dense(SDPBackend.CUDNN_ATTENTION), _dense_bytes(2)),
        Contender(
            "flash2",
            "dense, FlashAttention-2",
            "bhsd",
            False,
            _torch_dense(SDPBackend.FLASH_ATTENTION),
            _dense_bytes(4),
        ),
        Contender("fa3", "dense, FlashAttention-3", "bshd", False, _fa3_dense, _dense_bytes(2)),
        Contender("fa4", "dense, FlashAttention-4", "bshd", False, _fa4_dense, _dense_bytes(4)),
    )
}
